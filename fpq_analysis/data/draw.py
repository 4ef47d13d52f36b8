"""A seeded sample from data of any form, of which no more is read than the sample."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from fpq_analysis.batch import FORMS, TARGETS, Batch, as_batch, one_by_one
from fpq_analysis.data.batches import sample_order
from fpq_analysis.errors import UserError
from fpq_analysis.nests import alike, by_field, joined, mapped, named_leaves, raw, size, take

HEAD = 16  # samples that are read once more, to see whether they are the same
CHUNK = 256  # samples that are put together at a time

Transform = Callable[[Any], Any]


def draw(data: Any, n_data: int | None, seed: int, transform: Transform | None, name: str) -> list[Batch]:
    """`n_data` samples: drawn without replacement by `seed` where samples have places, or else the first ones.

    Args:
        data: a map-style data set or a DataLoader of one, from which only these samples are read; an `IterableDataset`,
            of samples too; one batch; or an iterable of batches.
        n_data: None for all.
        transform: of one sample's inputs.
        name: of the data, for errors.

    Returns:
        Batches; samples of one shape are in one.

    Raises:
        UserError: for what is no data, or cannot be put together.
    """
    collate: Callable[[list[Any]], Any] = default_collate
    chunk, of_loader = CHUNK, False
    puts_together = isinstance(data, DataLoader) and data.batch_sampler is not None
    if puts_together and not isinstance(data.dataset, IterableDataset):
        collate, chunk, of_loader, data = data.collate_fn, data.batch_size or CHUNK, True, data.dataset
    form = getattr(data, "format", None)
    if type(data).__module__.startswith("datasets.") and (form is None or form["type"] is None):
        data = data.with_format("torch")  # not lists of numbers
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=min(CHUNK, n_data or CHUNK))
    if of_loader or _has_places(data):
        order = sample_order(len(data), n_data, seed)
        items = (_item(data, place, transform, name) for place in order.tolist())
        parts = [_batch(collate, chunk_of, name) for chunk_of in _chunks(items, chunk)]
    else:
        batches = one_by_one(data)
        if batches is not data:  # a single batch
            whole = as_batch(data)
            parts = [take(whole, sample_order(size(whole), n_data, seed))]
        else:
            parts = list(_first(batches, n_data, name))
        if transform is not None:
            parts = [_transformed(part, transform, name) for part in parts]
    if not parts or not size(parts[0]):
        raise UserError(f"There is no data in '{name}'. Was an iterator used up before?")
    return [joined(parts)] if all(alike(part, parts[0]) for part in parts) else parts


def _has_places(data: Any) -> bool:
    """Whether it is a map-style data set."""
    plain = isinstance(data, (Tensor, np.ndarray, str, tuple, list, Mapping, type)) or is_dataclass(data)
    return not plain and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _item(data: Any, place: int, transform: Transform | None, name: str) -> Any:
    try:
        item = data[place]
    except Exception as error:  # the user's code: anything can happen
        raise UserError(f"Sample {place} of '{name}' cannot be read: {type(error).__name__}: {error}.") from error
    if is_dataclass(item) and not isinstance(item, type):
        item = by_field(item)
    if not isinstance(item, (tuple, list, Mapping)):
        raise UserError(
            f"A sample of '{name}' is a {type(item).__name__}, without a label: it must be a pair (inputs, target), or "
            f"a dict with its target under {', '.join(TARGETS)}."
        )
    if transform is None:
        return item
    if isinstance(item, Mapping):
        inputs = {key: value for key, value in item.items() if key not in TARGETS}
        return (_apply(transform, inputs, name), *(value for key, value in item.items() if key in TARGETS))
    inputs, *rest = item
    return (_apply(transform, inputs, name), *rest)


def _apply(transform: Transform, inputs: Any, name: str) -> Any:
    try:
        found = transform(inputs)
    except Exception as error:  # the user's code: anything can happen
        raise UserError(
            f"The transform fails on a sample of '{name}': {type(error).__name__}: {error}. It is given the inputs of "
            "one sample, without its label."
        ) from error
    if found is None:
        raise UserError(f"The transform gave nothing for a sample of '{name}'; does its return statement miss?")
    return found


def _batch(collate: Callable[[list[Any]], Any], items: list[Any], name: str) -> Batch:
    try:
        return as_batch(collate(items))
    except UserError:
        raise
    except Exception as error:  # of shapes, of types, or the user's own function
        what = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"The samples of '{name}' cannot be put into a batch ({type(error).__name__}: {what}). Bring them to "
            "tensors of one shape by a transform (--transform package.module:function), or give a DataLoader with a "
            "collate_fn."
        ) from error


def _transformed(batch: Batch, transform: Transform, name: str) -> Batch:
    samples = (take(batch, place) for place in range(size(batch)))
    items = [(_apply(transform, inputs, name), targets) for inputs, targets in samples]
    return _batch(default_collate, items, name)


def _chunks(items: Iterable[Any], most: int) -> Iterator[list[Any]]:
    found: list[Any] = []
    for item in items:
        found.append(item)
        if len(found) == most:
            yield found
            found = []
    if found:
        yield found


def _first(batches: Iterable[Any], n_data: int | None, name: str) -> Iterator[Batch]:
    left = n_data
    try:
        for given in batches:
            batch = as_batch(given)
            if size(batch):
                yield mapped(Tensor.detach, take(batch, slice(left)))
            if left is not None and (left := left - size(batch)) <= 0:
                return
    except UserError:
        raise
    except Exception as error:  # the user's code: anything can happen
        raise UserError(f"The batches of '{name}' end with {type(error).__name__}: {error}. {FORMS}") from error


def fingerprint(batches: list[Batch]) -> str:
    """Hash of all values, types and shapes."""
    digest = hashlib.sha256()
    for place, leaf in named_leaves(batches):
        if isinstance(leaf, Tensor):
            digest.update(f"{place}{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(raw(leaf))
        else:
            digest.update(f"{place}{leaf}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def as_read(turn: int) -> Iterator[None]:
    """Inside, the global random states are those of this turn; behind it, what they were before."""
    states = np.random.get_state(), random.getstate()  # noqa: NPY002 -- the global one
    try:
        with torch.random.fork_rng(), torch.inference_mode(False):
            torch.manual_seed(turn)
            np.random.seed(turn)  # noqa: NPY002
            random.seed(turn)
            yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])
