"""The rows of a training as scalars for TensorBoard, in the run's folder: `tensorboard --logdir checkpoints`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpq_analysis.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENTS = "events.out.tfevents.*"


def check_tensorboard() -> None:
    """Raise `UserError` if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise UserError("TensorBoard is not installed: pip install 'fpq-analysis[tensorboard]'")


class EventLog:
    """Scalars by epoch; the file is begun with the first row.

    What a run's log held before is written anew from the rows of the run, so that one that goes on after a stop, or
    that is first asked for then, is whole, and has no epoch twice.

    Args:
        run: its folder.
    """

    def __init__(self, run: Path) -> None:
        check_tensorboard()
        self.run = run
        self._writer: SummaryWriter | None = None

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Write the last of a run's rows; at first all of them."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            for old in self.run.glob(EVENTS):
                old.unlink()
            self._writer = SummaryWriter(str(self.run))
        else:
            rows = rows[-1:]
        for row in rows:
            for tag, value in scalars(row):
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Nothing more will come."""
        if self._writer is not None:
            self._writer.close()


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row of `train.jsonl` under TensorBoard's names, which show what is alike side by side."""
    for name, value in row.items():
        if name == "epoch" or not isinstance(value, int | float):
            continue
        kind, _, which = name.partition("_")
        if kind == "loss":
            yield f"loss/{which or 'all'}", value
        elif name.endswith("_accuracy"):
            yield f"accuracy/{kind}", value
        else:
            yield name, value
