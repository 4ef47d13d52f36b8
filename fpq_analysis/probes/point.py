"""Where a probe measures: one model, one loss, one fixed set of data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

Rows = list[dict[str, Any]]


def stored(samples: Iterable[Any]) -> list[float]:
    """The `samples` of a row: numbers to seven digits, all that float32 has."""
    return [float(f"{sample:.7g}") for sample in samples]


# What a probe may need beside the checkpoint's own network; a checkpoint without it is passed over.
NEEDS = {
    "quantizers": "the network is quantized",
    "teacher": "the float network the run started from",
    "previous": "the same run's network an epoch before",
}


@dataclass(frozen=True)
class Point:
    """A model in eval mode with the data to measure it on, on one device.

    Attributes:
        batches: (inputs, targets).
        seed: of everything random in the measurement.
        memory: what a probe wants to find again at the next checkpoint of the same run (a warm start), by its name;
            it may change a measurement's cost, never its meaning.
        teacher, previous: networks in eval mode, there if the probe needs them; see `NEEDS`.
    """

    model: nn.Module
    batches: tuple[Tensor, Tensor]
    loss: str = "cross_entropy"
    seed: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    teacher: nn.Module | None = None
    previous: nn.Module | None = None


class Probe(Protocol):
    """A measurement: a frozen dataclass of settings, called on a `Point`, gives rows (columns: `records/table.py`)."""

    name: str
    version: int  # raised when the numbers change, so that old records do not count as done

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of `NEEDS`; a plain class attribute will do."""
        ...

    def __call__(self, point: Point) -> Rows:
        """Measure; the last row is the total, whose presence on disk means that the measurement is complete."""
        ...
