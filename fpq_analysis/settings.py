"""Settings as fields of a dataclass, with help text and allowed values: one definition for all interfaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from typing import Any, TypeVar

from fpq_analysis.errors import UserError, did_you_mean

T = TypeVar("T")
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "positive": (lambda value: value > 0, "must be above zero"),
    "non-negative": (lambda value: value >= 0, "must not be negative"),
    "fraction": (lambda value: 0 <= value < 1, "must be from 0 to below 1"),
    "seed": (lambda value: -(2**63) <= value < 2**64, "must fit into 64 bits"),
    "probability": (lambda value: 0 <= value <= 1, "must be a probability, from 0 to 1"),
}


def setting(default: T, help: str, *, choices: Iterable[str] = (), within: str | None = None) -> T:
    """A field of a settings dataclass.

    Args:
        help: what the command line and the class's docstring say of it; `{choices}` becomes the names, `a, b or c`.
        choices: the names it may have, beside None where that is the default.
        within: a key of `RANGES`.
    """
    names = tuple(choices)
    text = help.format(choices=" or ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))))
    made: Any = field(default=default, metadata={"help": text, "choices": names, "within": within})
    return made


def documented(cls: type[T]) -> type[T]:
    """The dataclass `cls`, its docstring with a line for each field."""
    lines = (f"    {one.name}: {one.metadata['help']}" for one in fields(cls))  # type: ignore[arg-type]
    cls.__doc__ = "\n".join([f"{cls.__doc__}", "", "Attributes:", *lines])
    return cls


def check_settings(settings: Any) -> None:
    """Raise `UserError` if a field of `settings` has a value it may not have."""
    for one in fields(settings):
        value, choices, within = getattr(settings, one.name), one.metadata["choices"], one.metadata["within"]
        if choices and value not in choices and not (value is None and one.default is None):
            near = did_you_mean(str(value), choices)
            raise UserError(f"Unknown {one.name} '{value}'{near}. Known: {', '.join(choices)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{one.name} is {value}, and must be a finite number.")
        if within and value is not None and not RANGES[within][0](value):
            raise UserError(f"{one.name} is {value}, and {RANGES[within][1]}.")
