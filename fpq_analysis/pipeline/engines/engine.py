"""What an engine is, and engines by name: those of the package, and those that other packages bring."""

from __future__ import annotations

import re
from concurrent.futures import Executor
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.text import duration

# By the name before the colon of `--executor`; a package adds its own by an entry point of this group.
GROUP = "fpq_analysis.engines"
ENGINES = {
    "serial": "fpq_analysis.pipeline.engines.serial:SerialExecutor",
    "processes": "fpq_analysis.pipeline.engines.processes:ProcessEngine",
    "dask": "fpq_analysis.pipeline.engines.dask:DaskEngine",
    "slurm": "fpq_analysis.pipeline.engines.slurm:SlurmEngine",
    "ranks": "fpq_analysis.pipeline.engines.ranks:RanksExecutor",
}


@dataclass(frozen=True)
class Resources:
    """What an engine may use.

    Attributes:
        jobs: tasks at a time; None: as many as the engine thinks right.
        device: on which the tasks compute, as the user named it.
        folder: where the engine may keep files of its own, and other machines see them.
        batch: tasks that may be put together, where beginning one costs much.
    """

    jobs: int | None = 1
    device: str = "auto"
    folder: Path = Path()
    batch: int = 8


class Engine(Executor):
    """An executor that a command can name.

    A task that cannot be done gives its future an exception; nothing else may go wrong because of it.  Leaving the
    engine as a context manager by an exception, Ctrl-C among them, gives up what has not been done.

    Attributes:
        in_hand: tasks it is given at a time: enough to be busy, few enough to call back if a measurement fails.
        about: what a user should know of it, a sentence.
    """

    in_hand = 256
    about = ""

    @classmethod
    def open(cls, address: str, resources: Resources) -> Self:
        """An engine for `--executor name:address`.

        Raises:
            UserError: if there is none at this address, or something it needs is not installed.
        """
        raise NotImplementedError

    def outlook(self, n_tasks: int, seconds: float) -> str:
        """What would be done with so many tasks that take one process on this machine so many seconds; a sentence."""
        return f"{n_tasks} tasks, about {duration(seconds)}."

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self.shutdown(wait=True, cancel_futures=kind is not None)
        return False


def open_engine(
    executor: str | None = None, jobs: int | str = 1, *, device: str = "auto", folder: str | Path = ".", batch: int = 8
) -> Engine:
    """The engine that `--executor` and `--jobs` ask for, to be used as a context manager.

    Args:
        executor: `name`, `name:address` or `name://address`; None: this process for one job, processes for several, or
            where this rank leads others, all of them together.
        jobs: tasks at a time, or `auto`.
        device, folder, batch: see `Resources`.

    Raises:
        UserError: for an unknown name, no number, or see `Engine.open`.
    """
    check_engine(executor, jobs)
    count = None if jobs == "auto" else int(jobs)
    from fpq_analysis.ranks.leading import leading  # torch, which processes do not want before they are set up

    if executor is None:
        executor = "ranks" if leading() else "serial" if count == 1 else "processes"
    elif leading():
        raise UserError("All ranks measure each checkpoint together; leave --executor out, or torchrun.")
    name, address = _parts(executor)
    return _kind(name).open(address, Resources(count, device, Path(folder), batch))


def check_engine(executor: str | None, jobs: int | str) -> None:
    """Raise `UserError` for no number of jobs, an unknown name, or an engine whose package is not installed."""
    if jobs != "auto" and (not str(jobs).isdecimal() or int(jobs) < 1):
        raise UserError(f"--jobs {jobs} is no number of processes. Write 1 or more, or auto.")
    if executor is not None:
        _kind(_parts(executor)[0])


def _parts(executor: str) -> tuple[str, str]:
    name, address = re.fullmatch(r"([^:]*)(?::(?://)?(.*))?", executor, re.DOTALL).groups()  # type: ignore[union-attr]
    return name, address or ""


def not_installed(name: str, error: ImportError) -> UserError:
    """What to say where the packages of an engine of ours are missing: its extra has its name."""
    return UserError(f"--executor {name} needs {error.name}; install it with pip install 'fpq-analysis[{name}]'.")


def _kind(name: str) -> type[Engine]:
    found = {point.name: point for point in entry_points(group=GROUP)}
    found |= {ours: EntryPoint(ours, place, GROUP) for ours, place in ENGINES.items()}
    if name not in found:
        raise UserError(
            f"Unknown executor '{name}'{did_you_mean(name, found)}. Known: {', '.join(sorted(found))}. Another package "
            "can bring more: docs/extending.md, An execution engine."
        )
    try:
        return found[name].load()
    except ImportError as error:
        raise UserError(f"The executor '{name}' ({found[name].value}) cannot be loaded: {error}.") from error
