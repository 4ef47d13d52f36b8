"""Data in micro-batches of a size to work with; and the arithmetic curvature is measured in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpq_analysis.batch import Batch as Batch
from fpq_analysis.batch import as_batch, one_by_one
from fpq_analysis.errors import UserError
from fpq_analysis.nests import alike, joined, leaves, size, split

# Scalars of input a micro-batch may hold by default: 32 CIFAR images.  On a CPU, larger ones leave its cache and are
# slower for it; much smaller images are bounded by the cost of a call instead.
INPUT_SCALARS = 32 * 3 * 32 * 32
LARGEST = 256
# Products with kept graphs go over the weights once a micro-batch, which for eleven million of them costs as much as 16
# images: they want them larger, by so much.
MERGED = 8


def as_batches(batches: Batch | Iterable[Any], micro_batch: int | None = None) -> list[Batch]:
    """Pairs (inputs, targets) of at most `micro_batch` samples each, in the order given.

    Args:
        batches: one batch, or an iterable of them (a list, a DataLoader), gone through once; see `batch.FORMS`.
        micro_batch: the most samples in a pair; None for as many as `INPUT_SCALARS` allows.

    Raises:
        UserError: if there is nothing in it, or something that is no batch, with the field that is not understood.
    """
    found: list[Batch] = []
    for batch in one_by_one(batches):
        pair = as_batch(batch)
        if n := size(pair):
            scalars = sum(t.numel() // n for t in leaves(pair[0]))
            found += split(pair, micro_batch or max(1, min(LARGEST, INPUT_SCALARS // max(1, scalars))))
    if not found:
        raise UserError("There is no data in the batches. Was an iterator used up before?")
    return found


def merged(batches: list[Batch], most: int | None = None) -> list[Batch]:
    """Neighbours of one shape put together, up to `most` samples, or `MERGED` times the first one's."""
    most = most or MERGED * size(batches[0])
    groups: list[list[Batch]] = []
    for batch in batches:
        fits = groups and sum(map(size, groups[-1])) + size(batch) <= most and alike(groups[-1][0], batch)
        if fits:
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return list(map(joined, groups))


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 means float32: TF32 (ten bits of mantissa, cuDNN's default) and any autocast are off.

    Attention takes its plain form, as the fused ones have no second derivative.
    """
    cudnn: Any = torch.backends.cudnn  # typed in part only
    places: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        with (
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
