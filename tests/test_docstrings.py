"""What every public name's docstring owes to its reader: each argument, by its name, and errors."""

from __future__ import annotations

import inspect
import re

import pytest

import fpq_analysis

SEE = re.compile(r"(?:see|as for) `(\w+)`")


def said(name: str, *before: str) -> str:
    """A docstring, with those that it refers to for what it leaves out."""
    text = inspect.getdoc(getattr(fpq_analysis, name)) or ""
    others = {other for other in SEE.findall(text) if hasattr(fpq_analysis, other)} - {name, *before}
    return "\n".join([text, *(said(other, name, *before) for other in sorted(others))])


@pytest.mark.parametrize("name", sorted(fpq_analysis.__all__))
def test_every_argument_is_described(name):
    value = getattr(fpq_analysis, name)
    text = said(name)
    assert text.splitlines()[0].endswith((".", ":")), "a sentence comes first"
    if isinstance(value, type) and issubclass(value, Exception):
        return
    arguments = [one for one in inspect.signature(value).parameters if one not in ("args", "kwargs")]
    assert not [one for one in arguments if not re.search(rf"\b{one}\b", text)]
