"""The samples that a monitor measures on, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fpq_analysis.batch import Batch
from fpq_analysis.data import Dataset, training_sample
from fpq_analysis.data.draw import draw, fingerprint
from fpq_analysis.nests import mapped


@dataclass(frozen=True)
class Sample:
    """What is measured on.

    Attributes:
        batches: a pair (inputs, targets), or where samples are of several shapes, a list of such.
        name: of the data set.
        fingerprint: equal only if every sample is.
    """

    batches: Batch | list[Batch]
    name: str
    fingerprint: str


def draw_sample(data: Batch | Iterable[Any] | Dataset, n_data: int | None, seed: int) -> Sample:
    """The samples to measure on.

    Args:
        data, n_data, seed: see `CurvatureMonitor`.

    Raises:
        UserError: if these are no data.
    """
    if isinstance(data, Dataset):
        return Sample(training_sample(data, n_data or len(data.train), seed), data.name, data.fingerprint)
    batches = mapped(Tensor.detach, draw(data, n_data, seed, None, "own"))
    return Sample(batches[0] if len(batches) == 1 else batches, "own", fingerprint(batches))
