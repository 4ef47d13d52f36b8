"""Nests: a tensor, or tuples, lists, mappings and dataclasses of them, whose first axis is that of the samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fpq_analysis.text import listed

# A tensor; or a tuple, list, mapping or dataclass of nests, with None and bool where something is left out or switched.
Nest = Any


def mapped(function: Callable[..., Any], nest: Nest, *others: Nest) -> Nest:
    """A nest of the same form with `function` of every tensor (and of those in its place in the others) instead.

    Any mapping becomes a dict.  What is no tensor stays as it is.
    """
    if isinstance(nest, Tensor):
        return function(nest, *others)
    if isinstance(nest, Mapping):
        return {key: mapped(function, value, *(other[key] for other in others)) for key, value in nest.items()}
    if isinstance(nest, (tuple, list)):
        parts = [mapped(function, *parts) for parts in zip(nest, *others, strict=True)]
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
    if is_dataclass(nest) and not isinstance(nest, type):
        found = copy.copy(nest)
        for name, value in by_field(nest).items():
            values = [value, *(getattr(one, name) for one in others)]
            object.__setattr__(found, name, mapped(function, *values))  # frozen ones, too
        return found
    return nest


def named_leaves(nest: Nest, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nest that is no nest itself, tensors or not, and where: `inputs['mask']`, `inputs[0]`."""
    if isinstance(nest, Mapping):
        for key, value in nest.items():
            yield from named_leaves(value, f"{name}[{key!r}]")
    elif isinstance(nest, (tuple, list)):
        for place, value in enumerate(nest):
            yield from named_leaves(value, f"{name}[{place}]")
    elif is_dataclass(nest) and not isinstance(nest, type):
        for field, value in by_field(nest).items():
            yield from named_leaves(value, f"{name}.{field}")
    else:
        yield name, nest


def by_field(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass's instance, by name; what is in them is not copied, as `dataclasses.asdict` does."""
    return {field.name: getattr(instance, field.name) for field in fields(instance)}


def raw(t: Tensor) -> memoryview:
    """The bytes of a tensor on any device, to be hashed."""
    array: Any = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # no Buffer before Python 3.12
    return memoryview(array)


def leaves(nest: Nest) -> list[Tensor]:
    """The tensors of a nest, in order."""
    return [leaf for _, leaf in named_leaves(nest) if isinstance(leaf, Tensor)]


def size(nest: Nest) -> int:
    """Samples in a nest."""
    return len(leaves(nest)[0])


def device_of(nest: Nest) -> torch.device:
    """Where its tensors are."""
    return leaves(nest)[0].device


def take(nest: Nest, which: Any) -> Nest:
    """Some of the samples: a slice, or a tensor of places."""
    return mapped(lambda t: t[which], nest)


def split(nest: Nest, most: int) -> list[Nest]:
    """Nests of at most so many samples each."""
    return [take(nest, slice(start, start + most)) for start in range(0, size(nest), most)]


def joined(nests: list[Nest]) -> Nest:
    """The samples of all, one after the other."""
    return mapped(lambda *parts: torch.cat(parts), *nests)


def alike(one: Nest, other: Nest) -> bool:
    """Whether the two are of one form, and their samples of one shape, so that they can be joined."""
    pairs = [[(n, t.shape[1:] if isinstance(t, Tensor) else t) for n, t in named_leaves(nest)] for nest in (one, other)]
    return pairs[0] == pairs[1]


def moved(nest: Nest, device: torch.device, dtype: torch.dtype | None = None) -> Nest:
    """On a device; floating-point tensors in this type, if one is given."""

    def move(t: Tensor) -> Tensor:
        t = t.clone() if t.is_inference() else t  # made in inference mode, and not to be saved for a backward pass
        return t.to(device, dtype) if dtype and t.is_floating_point() else t.to(device)

    return mapped(move, nest)


def described(nest: Nest) -> str:
    """Shapes and types in words, for errors."""
    return listed(
        f"{name + ': ' if name else ''}shape {tuple(t.shape)} and type {t.dtype}"
        for name, t in named_leaves(nest)
        if isinstance(t, Tensor)
    )
