"""How a folder of checkpoints is read: as runs of this package, or of another program as a `ForeignRuns` says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fpq_analysis.errors import UserError
from fpq_analysis.runs.run import Header, Run, find_runs

if TYPE_CHECKING:
    from fpq_analysis.runs.checkpoint import Checkpoint


@runtime_checkable
class Source(Protocol):
    """How a folder of checkpoints is read; a value that other processes can be handed."""

    def find_runs(self, folder: str | Path) -> list[Path]:
        """Every run at or below `folder`, sorted."""
        ...

    def on_sample(self, n_data: int | None, seed: int) -> Source:
        """The same, for measuring on this sample: `header` then has the fingerprint of that, or of all the data."""
        ...

    def checkpoints(self, run: Path) -> dict[int, Path]:
        """Epoch to file for one run, in order of epochs."""
        ...

    def header(self, path: Path) -> Header:
        """What can be known of a checkpoint without its weights."""
        ...

    def read_checkpoint(self, path: Path) -> Checkpoint:
        """Read one file."""
        ...


@dataclass(frozen=True)
class OwnRuns:
    """Runs that `fpq-analyze train` wrote; torch is loaded only where weights are read."""

    def find_runs(self, folder: str | Path) -> list[Path]:
        """See `run.find_runs`."""
        return find_runs(folder, monitored=True)

    def on_sample(self, n_data: int | None, seed: int) -> OwnRuns:
        """These data are known as a whole."""
        return self

    def checkpoints(self, run: Path) -> dict[int, Path]:
        """See `Run.checkpoints`."""
        return Run(run).checkpoints

    def header(self, path: Path) -> Header:
        """From `run.json`; the file itself is read only if that does not say enough."""
        return Run(path.parent).header(path) or self.read_checkpoint(path).header

    def read_checkpoint(self, path: Path) -> Checkpoint:
        """See `checkpoint.read_checkpoint`."""
        from fpq_analysis.runs.checkpoint import read_checkpoint

        return read_checkpoint(path)


def one_run(ckpt_dir: str | os.PathLike[str]) -> Path:
    """The only run at or below a folder.

    Raises:
        UserError: if there is none, or more than one.
    """
    found = source_of(ckpt_dir).find_runs(os.fspath(ckpt_dir))
    if len(found) > 1:
        held = ", ".join(sorted(run.name for run in found)[:3]) + (", ..." if len(found) > 3 else "")
        raise UserError(f"'{os.fspath(ckpt_dir)}' holds more than one run ({held}); name one of them.")
    return found[0]


def source_of(ckpt_dir: str | os.PathLike[str]) -> Source:
    """How checkpoints in this folder are read."""
    return ckpt_dir if isinstance(ckpt_dir, Source) else OwnRuns()
