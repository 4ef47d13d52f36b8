"""What a batch is, and the forms in which it may be handed over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpq_analysis.errors import UserError
from fpq_analysis.nests import Nest, by_field, named_leaves

Batch = tuple[Nest, Nest]  # inputs and targets, of the same samples

# Fields of a batch that is a mapping or a dataclass which are its targets.
TARGETS = ("labels", "label", "targets", "target")
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # which torch can hold, and little else
FORMS = (
    "Data are a pair (inputs, targets), or an iterable of such pairs: inputs and targets are tensors, or tuples, dicts "
    "or dataclasses of them, with the samples along the first axis. A batch may be a dict or dataclass, too, with its "
    f"targets under {', '.join(TARGETS[:-1])} or {TARGETS[-1]}."
)


def one_by_one(batches: Any) -> Iterable[Any]:
    """Data as an iterable of batches; a single batch as one of it.

    Raises:
        UserError: for what is no data, or may mean two things.
    """
    if isinstance(batches, Mapping) or is_dataclass(batches):
        return [batches]
    if isinstance(batches, tuple) and len(batches) == 2:
        one, other = batches
        if not isinstance(one, (Tensor, np.ndarray)) and _form(one) == _form(other):
            raise UserError(
                "It cannot be told whether these data are a single batch, of inputs and targets, or two batches, as "
                "both parts look alike. Put one or two batches into a list: [(inputs, targets)]."
            )
        return [batches]
    no_batches = isinstance(batches, (Tensor, np.ndarray, str, type))
    if no_batches or not isinstance(batches, Iterable):
        if hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not no_batches:
            raise UserError(
                f"The data are a {type(batches).__name__}, which gives single samples. Make batches of them: "
                "torch.utils.data.DataLoader(data, batch_size=64)."
            )
        raise UserError(f"The data are a {type(batches).__name__}. {FORMS}")
    return batches


def _form(part: Any) -> Any:
    if isinstance(part, Mapping):
        return set(part)
    return len(part) if isinstance(part, (tuple, list)) else type(part)


def as_batch(batch: Any) -> Batch:
    """A batch as a pair (inputs, targets) of nests of tensors.

    Raises:
        UserError: with the field that is not understood.
    """
    if is_dataclass(batch):
        batch = by_field(batch)
    if isinstance(batch, Mapping):
        named = [name for name in TARGETS if name in batch]
        held = ", ".join(map(repr, batch)) or "none"
        if len(named) != 1:
            many = f"several ({', '.join(named)})" if named else "none"
            raise UserError(
                f"A batch has the fields {held}, of which one must be its targets, under {', '.join(TARGETS)}; there "
                f"are {many}. Give pairs (inputs, targets) instead."
            )
        if len(batch) == 1:
            raise UserError(f"A batch has the field {held} alone, and no inputs.")
        batch = {name: value for name, value in batch.items() if name not in TARGETS}, batch[named[0]]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        parts = f" of {len(batch)} parts" if isinstance(batch, (tuple, list)) else ""
        raise UserError(f"A batch is a {type(batch).__name__}{parts}. {FORMS}")
    pair = _tensors(batch[0]), _tensors(batch[1])
    sizes: dict[str, int] = {}
    for name, nest in zip(("inputs", "targets"), pair, strict=True):
        before = len(sizes)
        for place, leaf in named_leaves(nest, name):
            if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
                layout = str(leaf.layout).removeprefix("torch.")
                raise UserError(f"{place} of a batch is a tensor of layout {layout}, and must be dense: .to_dense().")
            if isinstance(leaf, Tensor) and leaf.ndim:
                sizes[place] = len(leaf)
            elif isinstance(leaf, Tensor):
                raise UserError(f"{place} of a batch is a single number; its first axis must be that of the samples.")
            elif leaf is not None and not isinstance(leaf, bool):
                of = f" of type {leaf.dtype}" if isinstance(leaf, np.ndarray) else ""
                raise UserError(f"{place} of a batch is a {type(leaf).__name__}{of}, which is not understood. {FORMS}")
        if len(sizes) == before:
            raise UserError(f"The {name} of a batch hold no tensor. {FORMS}")
    if len(set(sizes.values())) > 1:
        if list(sizes) == ["inputs", "targets"]:
            what = f"{sizes['inputs']} inputs and {sizes['targets']} targets"
        else:
            what = ", ".join(f"{n} samples in {place}" for place, n in sizes.items())
        raise UserError(f"A batch has {what}; each input needs one target.")
    return pair


def _tensors(nest: Any) -> Nest:
    """With tensors in place of arrays, and dicts of other mappings."""
    if isinstance(nest, Tensor):
        nest = nest.detach()  # what made it is none of the network's
        return nest.long() if nest.dtype in UNSIGNED else nest
    if isinstance(nest, np.ndarray):
        native = nest.astype(nest.dtype.newbyteorder("="), copy=False)
        try:
            return _tensors(torch.from_numpy(np.require(native, requirements=["C", "W"])))
        except TypeError:  # of strings, or objects
            return nest
    if isinstance(nest, Mapping):
        return {name: _tensors(value) for name, value in nest.items()}
    if isinstance(nest, (tuple, list)) and not hasattr(nest, "_fields"):
        return type(nest)(map(_tensors, nest))
    return nest
