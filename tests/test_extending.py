"""`docs/extending.md` does what it says: its files go into a copy of the package, and its code and commands run there.

A block of Python whose first line is a comment with a path is a new file, and a `diff` changes one. Other Python is
executed and prints the numbers in its comments; the commands of a `console` block end with exit code 0.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_, *PARTS = re.split(r"^## (.*)\n", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)
SECTIONS = dict(zip(PARTS[::2], PARTS[1::2], strict=True))
# What an extension may touch at most, of the package's files.
MOST = {"A probe": 3, "A training method": 2, "A loss": 1, "An execution engine": 1}
FOR_TESTS = ["--model", "tests.nets:tiny", "--device", "cpu"]


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def apply(old: str, hunks: str) -> str:
    """`old`, with what a diff's hunks take out and add; their context must be found exactly once."""
    for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
        lines = [line or " " for line in hunk.splitlines()]
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert old.count(before) == 1, f"found {old.count(before)} times, and not once:\n{before}"
        old = old.replace(before, after)
    return old


def write_files(text: str, tree: Path) -> set[str]:
    """Add and change the files of a section; their names."""
    written = set()
    for block in blocks(text, "python"):
        if path := re.match(r"# (\S+\.py)\n", block):
            assert not (tree / path[1]).exists(), f"{path[1]} is there already: show the change as a diff"
            (tree / path[1]).write_text(block[path.end() :])
            written.add(path[1])
    for block in blocks(text, "diff"):
        path = re.match(r"--- (\S+)\n\+\+\+ \1\n", block)
        assert path, f"begins with --- PATH and +++ PATH: {block}"
        (tree / path[1]).write_text(apply((tree / path[1]).read_text(), block[path.end() :]))
        written.add(path[1])
    return written


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_is_followed(title, tiny_runs, tmp_path):
    text = SECTIONS[title]
    for folder in ("fpq_analysis", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_runs, tmp_path / "checkpoints")
    written = write_files(text, tmp_path)
    assert len(written) <= MOST.get(title, 0), written

    def run(*command: str) -> str:
        env = os.environ | {"PYTHONPATH": str(tmp_path), "MPLBACKEND": "Agg"}
        done = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    examples = "".join(block for block in blocks(text, "python") if not re.match(r"# \S+\.py\n", block))
    if examples:
        assert run(sys.executable, "-c", examples).splitlines() == re.findall(r"^# (\d.*)$", examples, re.MULTILINE)
    for line in re.findall(r"^\$ (.*)$", "".join(blocks(text, "console")), re.MULTILINE):
        program, *arguments = shlex.split(line)
        module = {"fpq-analyze": "fpq_analysis.cli", "pytest": "pytest"}[program]
        for_tests = FOR_TESTS if program == "fpq-analyze" else ["-n0", "-p", "no:cacheprovider"]
        run(sys.executable, "-m", module, *arguments, *for_tests)


def test_every_extension_that_is_promised_is_on_the_page():
    assert set(MOST) <= set(SECTIONS)


def test_a_change_that_does_not_fit_is_not_made():
    assert apply("a\nb\nc\n", "@@\n a\n-b\n+B\n+B\n@@\n c\n+d\n") == "a\nB\nB\nc\nd\n"
    with pytest.raises(AssertionError, match="found 0 times"):
        apply("a\nb\n", "@@\n b\n-c\n+d\n")
    with pytest.raises(AssertionError, match="found 2 times"):
        apply("a\nb\na\n", "@@\n a\n+c\n")
