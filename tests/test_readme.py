"""The examples of the README and of `docs/` run, and print what stands beside them."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# `test_extending.py` and `test_pages.py` run the others, which have files of their own.
OTHERS = ("extending.md", "data.md")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in OTHERS], ids=lambda page: page.name)
def test_examples_run_and_print_what_they_say(page):
    mpl.use("Agg")
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for example in examples:
        said = re.findall(r"^# (\d.*)$", example, re.MULTILINE)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example, page.name, "exec"), names)
        assert not said or printed.getvalue().splitlines() == said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_is_there(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
