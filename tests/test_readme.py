"""The README's example runs and prints what stands beside it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_prints_what_it_says():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    said = re.findall(r"^# (\d.*)$", example, re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert printed.getvalue().splitlines() == said
    assert len(said) == 2


def test_every_file_it_names_is_there():
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
