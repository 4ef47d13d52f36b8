"""The page of all commands: `{commands}` on a line of its own in a page becomes what `--help` says of each."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from sphinx.application import Sphinx

from fpq_analysis.cli import app as program

MARK = "{commands}\n"
KINDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
PAGE = re.compile(r"docs/(\w+)\.md")  # as `--help` names them


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _write_commands)
    return {"parallel_read_safe": True}


def _write_commands(app: Sphinx, docname: str, source: list[str]) -> None:
    if MARK in source[0]:
        group = typing.cast(Any, typer.main.get_command(program))
        source[0] = source[0].replace(MARK, "\n\n".join(map("\n".join, map(_section, group.commands.values()))))


def _section(command: Any) -> Iterator[str]:
    """One command in Markdown: what it does, examples, arguments, and its options under their headings."""
    name = f"{program.info.name} {command.name}"
    arguments = [one for one in command.params if not one.opts[0].startswith("-")]
    yield f"## {name}\n"
    usage = [name, *(_usage(one) for one in arguments), "[OPTIONS]"]
    yield f"```text\n{' '.join(usage)}\n```\n"
    examples = re.findall(rf"^ *({program.info.name} .*)$", command.help, re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", command.help):
        if paragraph.strip().startswith("[bold]Example"):
            yield "```console\n" + "".join(f"$ {line}\n" for line in examples) + "```\n"
        elif paragraph.strip() not in examples:
            yield _linked(paragraph) + "\n"
    panels: dict[str, list[Any]] = {}
    for one in command.params:
        panels.setdefault(getattr(one, "rich_help_panel", None) or "", []).append(one)
    kinds = {name: one.annotation for name, one in inspect.signature(command.callback).parameters.items()}
    for title, options in panels.items():
        if title:
            yield f"**{_linked(title)}**\n"
        for one in options:
            yield f"{_names(one, kinds)}\n: {_linked(one.help or '')}{_default(one)}\n"


def _usage(argument: Any) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _names(option: Any, kinds: dict[str, Any]) -> str:
    if not option.opts[0].startswith("-"):
        return f"`{_usage(option)}`"
    said = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    return said if getattr(option, "is_flag", False) else f"{said} `{_kind(kinds.get(option.name))}`"


def _kind(annotation: Any) -> str:
    for one in (annotation, *typing.get_args(annotation), *map(typing.get_origin, typing.get_args(annotation))):
        if one in KINDS:
            return KINDS[one]
        for inner in typing.get_args(one):
            if inner in KINDS:
                return KINDS[inner]
    return "TEXT"


def _default(option: Any) -> str:
    if option.default is None or option.default is False or option.default == []:
        return ""
    value = option.default
    if value is True:
        value = option.opts[0]
    return f" Default: `{' '.join(value) if isinstance(value, list) else value}`."


def _linked(text: str) -> str:
    """Markdown of a text of `--help`: options as code, pages as links."""
    text = re.sub(r"(?<![\w`])(--?[a-z][\w-]*)", r"`\1`", " ".join(text.split()))
    return PAGE.sub(r"[\1](\1.md)", text)
