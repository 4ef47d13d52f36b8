"""What is to be done, as frozen values that can be handed to any process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fpq_analysis.errors import UserError
from fpq_analysis.runs import Header, Source
from fpq_analysis.settings import RANGES

if TYPE_CHECKING:
    from fpq_analysis.probes import Probe
    from fpq_analysis.probes.point import Rows

Shard = tuple[int, int]  # (i, n): the i-th of n parts of the work
WHOLE: Shard = (1, 1)


@dataclass(frozen=True)
class Sampling:
    """On what everything is measured, and where: the same for all tasks of a command.

    Which data set it is stands in the checkpoint, or in the `ForeignRuns`.

    Attributes:
        n_data: samples, drawn without augmentation; None for all.
        seed: of the draw, and of everything random in a measurement.
        device: `auto`, or any name torch knows; chosen in the process that measures.
        data_root: where the data set lies, if not where it was when the run was trained.
        model: for a network of the user's own, `package.module:factory`.
        loss: a name of `losses.LOSSES`, or `package.module:name`.

    Raises:
        UserError: if so few samples give no error over the data, or for a seed that torch does not take.
    """

    n_data: int | None = 1024
    seed: int = 0
    device: str = "auto"
    data_root: str | None = None
    model: str | None = None
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        if self.n_data is not None and self.n_data < 2:
            raise UserError(f"n_data is {self.n_data}; an error over the data needs at least 2 samples.")
        accepts, otherwise = RANGES["seed"]
        if not accepts(self.seed):
            raise UserError(f"seed is {self.seed}, and {otherwise}.")


@dataclass(frozen=True)
class PlannedMeasurement:
    """One measurement of one checkpoint.

    Attributes:
        run: its folder.
        home: the folder whose `records/` holds its rows.
        path: the checkpoint.
        header: what was known of it when the measurement was planned.
        key: of its rows.
        networks: file of each single network that the probe needs, by its key in `probes.point.NEEDS`.
        auxiliary: files of the sequence of networks that the probe needs, in order.
        pieces: those to do, see `probes.point.Piecewise`; a single empty name if the probe cannot be split.
        known: value of each `signature_...` that stands in the records already.
    """

    run: Path
    home: Path
    path: Path
    header: Header
    key: str
    networks: dict[str, Path] = field(default_factory=dict)
    auxiliary: tuple[Path, ...] = ()
    pieces: tuple[str, ...] = ("",)
    known: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A piece of a measurement, with all that it takes to do it: the argument of `execute`.

    Attributes:
        settings: hash of all that does not depend on the checkpoint.
    """

    source: Source
    probe: Probe
    sampling: Sampling
    measurement: PlannedMeasurement
    settings: str
    piece: str = ""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What it has in common with the same task of another plan, when others may be done already."""
        return str(self.measurement.home.absolute()), self.measurement.key, self.piece


@dataclass(frozen=True)
class TaskResult:
    """What a task found, as rows for the records.

    Attributes:
        rows: of the piece.
        notes: of the measurement as a whole, if it was set up for this task.
    """

    rows: Rows
    notes: Rows
