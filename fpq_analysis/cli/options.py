"""Options of a command made from the fields of a settings dataclass, so that they are written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from fpq_analysis.errors import UserError

Command = Callable[..., None]


def option(name: str, kind: Any, default: Any, text: str, panel: str | None = None) -> inspect.Parameter:
    """A parameter that typer makes the option `--name` of; one that is off by default has no `--no-name`."""
    names = [f"--{name.replace('_', '-')}"] if default is False else []
    if isinstance(default, tuple):  # also by the singular, and once for each
        names, kind, default = (
            [f"--{name}", f"--{name.removesuffix('s')}"],
            list[str],
            [",".join(f"{x:g}" for x in default)],
        )
    annotation = Annotated[kind, typer.Option(*names, help=text, rich_help_panel=panel)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def numbers(name: str, texts: list[str]) -> tuple[float, ...]:
    """What was given for an option of several numbers, with commas, once or more often."""
    try:
        return tuple(float(number) for text in texts for number in text.split(","))
    except ValueError:
        raise UserError(f"'{','.join(texts)}' are no {name}. Write numbers with commas: 0.5,1,2.") from None


def with_options(command: Command, added: list[inspect.Parameter]) -> Command:
    """`command` as typer shall see it: its `**options` are these."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    named = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own if one.kind is not one.VAR_KEYWORD]
    command.__signature__ = inspect.Signature([*named, *added])  # type: ignore[attr-defined]
    return command


def options_of(
    settings: type, panel: str | None = None, panels: dict[type, str] | None = None
) -> Callable[[Command], Command]:
    """Give a command an option for each field of `settings`, in the order of the fields; they come as `**options`.

    Args:
        settings: a dataclass of `settings.setting` fields.
        panel: heading above them in `--help`; None for that of the command's own.
        panels: for the fields of these of its base classes, another heading.
    """
    headings = {one.name: text for base, text in (panels or {}).items() for one in fields(base)}
    hints = get_type_hints(settings)
    added = [
        option(one.name, hints[one.name], one.default, one.metadata["help"], headings.get(one.name, panel))
        for one in fields(settings)
    ]
    return functools.partial(with_options, added=added)
