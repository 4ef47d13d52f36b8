"""The forms in which data may be handed over, brought to one; and the arithmetic curvature is measured in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpq_analysis.errors import UserError

Batch = tuple[Tensor, Tensor]


# Scalars of input a micro-batch may hold by default: 32 CIFAR images.  On a CPU, larger ones leave its cache and are
# slower for it; much smaller images are bounded by the cost of a call instead.
INPUT_SCALARS = 32 * 3 * 32 * 32
LARGEST = 256
# Products with kept graphs go over the weights once a micro-batch, which for eleven million of them costs as much as 16
# images: they want them larger, by so much.
MERGED = 8


def as_batches(batches: Batch | Iterable[Batch], micro_batch: int | None = None) -> list[Batch]:
    """Pairs (inputs, targets) of at most `micro_batch` samples each, in the order given.

    Args:
        batches: one pair of tensors, or an iterable of pairs (a list, a DataLoader); it is gone through once.
        micro_batch: the most samples in a pair; None for as many as `INPUT_SCALARS` allows.

    Raises:
        UserError: if there is nothing in it, or something that is not a pair of tensors of equal length.
    """
    if isinstance(batches, tuple) and len(batches) == 2 and isinstance(batches[0], Tensor):
        batches = [batches]
    found: list[Batch] = []
    for pair in batches:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
            raise UserError("Data must be a pair of tensors (inputs, targets), or an iterable of such pairs.")
        x, y = pair
        if len(x) != len(y):
            raise UserError(f"A batch has {len(x)} inputs and {len(y)} targets; each input needs one target.")
        if len(x):
            most = micro_batch or max(1, min(LARGEST, INPUT_SCALARS // max(1, x[0].numel())))
            found += zip(x.split(most), y.split(most), strict=True)
    if not found:
        raise UserError("There is no data in the batches. Was an iterator used up before?")
    return found


def merged(batches: list[Batch]) -> list[Batch]:
    """Micro-batches for products: neighbours of one shape put together, up to `MERGED` times the first one's size."""
    most = MERGED * len(batches[0][0])
    groups: list[list[Batch]] = []
    for x, y in batches:
        last = groups[-1][0] if groups else (x[:0], y)
        fits = groups and sum(len(part) for part, _ in groups[-1]) + len(x) <= most
        if fits and last[0].shape[1:] == x.shape[1:] and last[1].shape[1:] == y.shape[1:]:
            groups[-1].append((x, y))
        else:
            groups.append([(x, y)])
    return [(torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])) for group in groups]


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
