"""Where a probe measures: one model, one loss, one fixed set of data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from fpq_analysis.losses import LossFunction

Rows = list[dict[str, Any]]


def stored(samples: Iterable[Any]) -> list[float]:
    """The `samples` of a row: numbers to seven digits, all that float32 has."""
    return [float(f"{sample:.7g}") for sample in samples]


# What a probe may need beside the checkpoint's own network; a checkpoint without it is passed over.
NEEDS = {
    "quantizers": "the network is quantized",
    "teacher": "the float network the run started from",
    "previous": "there is a checkpoint before it in its run",
    "trajectory": "the same run's earlier networks",
    "through": "further checkpoints are named",
}


@dataclass(frozen=True)
class Point:
    """A model in eval mode with the data to measure it on, on one device.

    Attributes:
        batches: (inputs, targets), tensors or nests of tensors; a list of such where samples are of several shapes.
        seed: of everything random in the measurement.
        teacher, previous: networks in eval mode, there if the probe needs them; see `NEEDS`.
        previous_epoch: that of `previous`, where it is known.
        auxiliary: those of the trajectory, in order, or the further ones that were named; on the CPU.
    """

    model: nn.Module
    batches: Any
    loss: str | LossFunction = "cross_entropy"
    seed: int = 0
    teacher: nn.Module | None = None
    previous: nn.Module | None = None
    previous_epoch: int | None = None
    auxiliary: Sequence[nn.Module] = ()


class Probe(Protocol):
    """A measurement: a frozen dataclass of settings, called on a `Point`, gives rows (columns: `records/table.py`)."""

    name: str
    version: int  # raised when the numbers change, so that old records do not count as done

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of `NEEDS`; a plain class attribute will do."""
        ...

    def __call__(self, point: Point) -> Rows:
        """Measure; the row of the whole network, the total, comes last."""
        ...


class Pieces(Protocol):
    """A measurement that is set up, and done piece by piece."""

    @property
    def notes(self) -> Rows:
        """What is known from setting it up alone.

        Pieces from two processes are put together if the `signature_...` among these rows agree.
        """
        ...

    def measure(self, piece: str) -> Rows:
        """The rows of a piece; one of them, of layer `all`, has the piece's name as its quantity.

        A row of another network than the centre has a key `network`: its place in `Point.auxiliary`.
        """
        ...


@runtime_checkable
class Piecewise(Probe, Protocol):
    """A probe made of pieces (the points of a grid), which are kept as they are done and may be done in any process."""

    def pieces(self, n_auxiliary: int) -> Sequence[str]:
        """Names of the pieces, which the settings and the number of further networks must be enough to know."""
        ...

    def begin(self, point: Point) -> Pieces:
        """Set it up on a point."""
        ...
