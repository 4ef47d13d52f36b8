"""Refuses what the ranks do not have in common: another network, other data or settings would give a wrong number."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from fpq_analysis.errors import UserError
from fpq_analysis.nests import raw
from fpq_analysis.ranks.division import meetings

T = TypeVar("T")
P = ParamSpec("P")


def check_same(what: str, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
    """Raise `UserError` unless every rank has the same numbers.

    Args:
        what: these are, as the beginning of a sentence.
        tensors: gives them, by name; not called where nothing is divided.
    """
    for name, rank, _, _ in _differences(lambda: {what: _fingerprint(t) for what, t in tensors()}):
        raise UserError(
            f"{what} not the same on all ranks: '{name}' of rank {rank} is not that of rank 0. Inside over_ranks() "
            "every rank is given the same network and all of the data in the same order, and measures its own share of "
            "the samples: no DistributedSampler, and no shuffling by a seed of its own."
        )


def same_on_all_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: calls with different settings on different ranks are refused.

    The first two arguments, network and data, are `check_same`'s; `device` and `micro_batch` may be each rank's own.
    """

    @functools.wraps(function)
    def call(*args: P.args, **settings: P.kwargs) -> T:
        given = {f"argument {i}": value for i, value in enumerate(args[2:], 3)} | settings
        own = {name: value for name, value in given.items() if name not in ("device", "micro_batch")}
        plain = {"the function": function.__name__} | {name: _in_words(value) for name, value in own.items()}
        for name, rank, here, there in _differences(lambda: plain):
            raise UserError(
                f"{function.__name__}() is called differently on the ranks: {name} is {here} on rank 0 and {there} on "
                f"rank {rank}. Inside over_ranks() all make the same calls."
            )
        return function(*args, **settings)

    return call


def _differences(own: Callable[[], dict[str, Any]]) -> Iterable[tuple[str, int, Any, Any]]:
    """Name, rank, the first rank's value and this rank's, of what is not the same."""
    ranks = meetings()
    if ranks is None:
        return
    with ranks.after("what should be the same"):
        mine = own()
    first, *others = ranks.of_all(mine)
    for rank, other in enumerate(others, 1):
        for name in first | other:
            if first.get(name) != other.get(name):
                yield name, rank, first.get(name), other.get(name)


def _fingerprint(t: Tensor) -> tuple[int, str, int]:
    return zlib.crc32(raw(t)), str(t.dtype), t.numel()


def _in_words(value: object) -> str:
    plain = isinstance(value, (str, int, float, tuple, list)) or value is None
    return repr(value) if plain else getattr(value, "__qualname__", type(value).__qualname__)
