"""The samples that a monitor measures on, and what they are called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fpq_analysis.curvature import as_batches
from fpq_analysis.data import Dataset, epoch_generator, training_sample
from fpq_analysis.errors import UserError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sample:
    """Inputs and targets.

    Attributes:
        name: of the data set.
        fingerprint: equal only if every sample is.
    """

    batch: Batch
    name: str
    fingerprint: str


def draw_sample(data: Batch | Iterable[Batch] | Dataset, n_data: int | None, seed: int) -> Sample:
    """The samples to measure on.

    Args:
        data, n_data, seed: see `CurvatureMonitor`.

    Raises:
        UserError: if these are no pairs of inputs and targets, or not of one shape.
    """
    if isinstance(data, Dataset):
        return Sample(training_sample(data, n_data or len(data.train), seed), data.name, data.fingerprint)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        ((inputs, targets),) = as_batches(data, max(1, len(data[0])))
        order = torch.randperm(len(inputs), generator=epoch_generator(seed, 0, "sample"))[:n_data]
        batch = inputs.detach()[order.to(inputs.device)], targets.detach()[order.to(targets.device)]
    else:
        batch = _joined(as_batches(_enough(data, n_data), 2**62), n_data)
    return Sample(batch, "own", _fingerprint(batch))


def _enough(data: Iterable[Batch], n_data: int | None) -> Iterable[Batch]:
    left = n_data or 2**62
    for pair in data:
        yield pair
        left -= len(pair[0])
        if left <= 0:
            return


def _joined(pairs: list[Batch], n_data: int | None) -> Batch:
    if len({(x.shape[1:], y.shape[1:]) for x, y in pairs}) > 1:
        raise UserError("The batches have samples of different shapes; give samples of one shape.")
    inputs, targets = (torch.cat(parts).detach()[:n_data] for parts in zip(*pairs, strict=True))
    return inputs, targets


def _fingerprint(data: Batch) -> str:
    digest = hashlib.sha256()
    for tensor in data:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
