"""No code on a page is left unread: Python is executed, or stands here with the reason why not; commands are parsed."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from fpq_analysis.cli import app
from tests.test_pages import PAGES as FOLLOWED
from tests.test_readme import OTHERS
from tests.test_readme import PAGES as RUN

ROOT = Path(__file__).parent.parent
DOCS = [
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "quantizers").glob("*.md"),
    *(ROOT / "docs" / "api").glob("*.md"),
]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS])
}
BLOCK = re.compile(r"^(`{3,}) *([^\n]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
EXECUTED = {
    *(str(path.relative_to(ROOT)) for path in RUN if path.name not in OTHERS),  # by test_readme.py
    *(f"docs/{page}" for page in FOLLOWED),  # by test_pages.py
    "docs/extending.md",  # by test_extending.py
}
NOT_EXECUTED = {  # page and first line: why
    ("docs/training_loop.md", "from fpq_analysis.integrations.lightning"): "test_integrations.py trains with Lightning",
    ("docs/training_loop.md", "from fpq_analysis.integrations.transformers"): "test_transformers.py trains with it",
    ("docs/scale.md", "torch.distributed.init_process_group()"): "test_ranks.py starts the ranks that it needs",
}
NO_CODE = {"text", "toml", "eval-rst", "toctree", "include", "grid"}
NOT_OURS = {"for", "pip", "python3", "pre-commit", "pytest"}


@cache
def program() -> dict[str, Any]:
    return cast(Any, typer.main.get_command(app)).commands


def blocks():
    for page, text in PAGES.items():
        for _, kind, body in BLOCK.findall(text):
            yield page, kind, body


def commands():
    """What stands behind the `$` of consoles, continuations joined; and commands in sentences."""
    for page, text in PAGES.items():
        for _, kind, body in BLOCK.findall(text):
            if kind == "console":
                for line in re.findall(r"^\$ (.*)$", body.replace("\\\n", " "), re.MULTILINE):
                    yield page, line
        for said in re.findall(r"`(fpq-analyze [a-z][^`\n]*)`", text):
            yield page, said
    for said in re.findall(r"^\| `([a-z][^`\n]*)`", PAGES["docs/commands.md"], re.MULTILINE):
        yield "docs/commands.md", f"fpq-analyze {said}"


def test_python_is_executed():
    excepted = set()
    for page, kind, body in blocks():
        language = kind.replace("{code-block} ", "")
        if language.split()[0].strip("{}:") in NO_CODE | {"console"}:
            continue
        assert language in ("python", "py", "diff"), f"{page}: nothing reads a block of {kind!r}"
        if kind == "diff":
            assert page == "docs/extending.md"
        elif page not in EXECUTED or kind != "python":
            compile(body, page, "exec")
            reasons = [key for key in NOT_EXECUTED if key[0] == page and body.startswith(key[1])]
            assert reasons, f"{page}: nothing executes\n{body}"
            excepted.update(reasons)
    assert excepted == set(NOT_EXECUTED), "an exception that is none"


def test_no_code_is_indented():
    """Such blocks are found by no test."""
    for page, text in PAGES.items():
        prose = BLOCK.sub("", text)
        assert not re.search(r"^    (\$|@|fpq-analyze|python|import|from)", prose, re.MULTILINE), page


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_a_command_is_understood(page, line):
    words = shlex.split(line, comments=True)
    while words and "=" in words[0]:  # NAME=value before the program
        words.pop(0)
    if not words:
        return
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    if words[0] == "torchrun":
        words = ["fpq-analyze", *words[words.index("fpq_analysis") + 1 :]]
    if words[0] != "fpq-analyze":
        assert words[0] in NOT_OURS, f"{page}: {line}"
        return
    name, *arguments = (word for word in words[1:] if not word.startswith("$"))
    for end in ("|", ">", "&&", ";"):
        arguments = arguments[: arguments.index(end)] if end in arguments else arguments
    if name == "--version" or page == "docs/extending.md":  # whose commands are executed
        return
    command = program()[name]
    if arguments and arguments != ["--help"]:
        command.make_context(name, arguments)  # an error if there is no such option, or a value is none of its type
