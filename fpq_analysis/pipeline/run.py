"""From a plan to records: tasks go to an executor, what comes back is written here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pandas as pd

from fpq_analysis.errors import Fault, UserError, going_on, raise_fault
from fpq_analysis.pipeline import store
from fpq_analysis.pipeline.engines.engine import Engine, open_engine
from fpq_analysis.pipeline.execute import execute, forget
from fpq_analysis.pipeline.plan import Plan, plan
from fpq_analysis.pipeline.task import WHOLE, PlannedMeasurement, Sampling, Shard, Task, TaskResult
from fpq_analysis.probes.landscape import LandscapeSettings
from fpq_analysis.probes.point import Probe
from fpq_analysis.progress import Progress
from fpq_analysis.ranks import dividing
from fpq_analysis.ranks.leading import lead, together


def measure(
    ckpt_dir: str | os.PathLike[str],
    probe: Probe,
    *,
    n_data: int | None = 1024,
    seed: int = 0,
    epochs: str = "all",
    through: Sequence[str | Path] = (),
    shard: Shard = WHOLE,
    overwrite: bool = False,
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
    loss: str = "cross_entropy",
    records: str | os.PathLike[str] | None = None,
    executor: Executor | str | None = None,
    jobs: int | str = 1,
    on_fault: Fault | None = None,
) -> pd.DataFrame:
    """Measure every checkpoint of every run at or below `ckpt_dir` that was not measured before.

    All checkpoints see the same `n_data` training samples (None: all), drawn by `seed`, without augmentation.

    Args:
        ckpt_dir: a run, or a folder of runs; for another program's checkpoints a `ForeignRuns`.
        epochs: of each run: `all`, `last`, or numbers with commas between.
        through: for landscapes on a plane of checkpoints, two or three files or runs (the last checkpoint of `epochs`),
            the centre first; `ckpt_dir` then has no part, but that a `ForeignRuns` says how they are read.
        shard: (i, n), the i-th of n parts of the work, kept in files of its own; call without it afterwards to gather
            these.
        overwrite: measure again what was measured.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        data_root: where the data set lies, if not where it was when the run was trained.
        model: for a network of your own, `package.module:factory`.  Its code is part of what was measured: after it
            changed, it is measured anew.
        loss: a name of `losses.LOSSES`, or `package.module:name` of a `Loss` or a function (outputs, targets) to the
            mean; its code is part of what was measured, too.
        records: folder in which measurements are kept, each run's under its name, where the runs themselves may not be
            written to; None: in the runs.
        executor: where tasks are done: a `concurrent.futures.Executor` of processes, or an engine by its name, see
            docs/scale.md; None: on this machine; inside `over_ranks()` on all ranks together, of which
            the first plans and writes.
        jobs: how many at a time, or `auto`; of no account for an `Executor`.
        on_fault: called with each checkpoint that cannot be measured and why; the others go on.  None: raise.

    Returns:
        The records of this probe with these settings on the checkpoints that are there now, old and new (columns:
        `records.COLUMNS`).

    Raises:
        UserError: if there is no checkpoint, the data are missing, or a checkpoint cannot be measured.
    """
    sampling = Sampling(n_data, seed, device, data_root, model, loss)
    what: dict[str, Any] = {"epochs": epochs, "through": through, "shard": shard}

    def planned_and_done() -> pd.DataFrame:
        todo = plan(ckpt_dir, probe, sampling, overwrite=overwrite, records=records, **what)
        if isinstance(executor, Executor):
            return run(todo, executor=executor, on_fault=on_fault)
        with open_engine(executor, jobs, device=device, folder=todo.root) as engine:
            return run(todo, executor=engine, on_fault=on_fault)

    return lead(planned_and_done) if dividing() else planned_and_done()


def measure_landscapes(
    ckpt_dir: str | os.PathLike[str],
    settings: LandscapeSettings | None = None,
    *,
    n_data: int | None = 512,
    epochs: str = "last",
    **options: Any,
) -> pd.DataFrame:
    """The landscape about the last checkpoint of every run at or below `ckpt_dir`; points on disk are not done again.

    All runs see the same samples; of one architecture they also get the same random directions, before
    normalisation.

    Args:
        settings: how to draw it; None for the default.
        n_data, epochs, options: see `measure`.

    Returns:
        The records of these landscapes (columns: `records.COLUMNS`; quantities: `probes/landscape/grid.py`).

    Raises:
        UserError: see `measure`.
    """
    return measure(ckpt_dir, settings or LandscapeSettings(), n_data=n_data, epochs=epochs, **options)


def run(todo: Plan, *, executor: Executor | None = None, on_fault: Fault | None = None) -> pd.DataFrame:
    """Do what `plan` listed; see `measure`."""
    report = on_fault or raise_fault
    failed: set[Path] = set()

    def fail(path: Path, fault: UserError) -> None:
        if path not in failed:
            failed.add(path)
            report(path, fault)

    for path, fault in todo.faults:
        fail(path, fault)
    name = todo.probe.name
    for home in todo.homes if todo.shard == WHOLE else ():
        with going_on(partial(fail, home), f"'{home}'"):
            store.gather(home, name, todo.overwrite)
    writer = store.Writer(name, todo.shard, todo.measurements)
    try:
        with Progress(todo.n_left, name) as progress:

            def wanted() -> Iterator[Task]:
                for task in todo.tasks():
                    if task.measurement.path in failed:
                        progress.advance()
                    else:
                        yield task

            for task, future, busy in _results(executor or open_engine(), wanted()):
                measurement = task.measurement
                with going_on(partial(fail, measurement.path), f"'{measurement.path}'"):
                    result = future.result()
                    if measurement.path not in failed:
                        writer.add(measurement, result)
                progress.advance(busy=busy)
    finally:  # stopped by the user, say
        with suppress(UserError):  # of a rank that was lost
            together(forget)
        _flush(writer, todo.measurements, fail)
    return store.read(todo.root, todo.homes, name, todo.done | writer.written, fail)


def _results(executor: Executor, tasks: Iterable[Task]) -> Iterator[tuple[Task, Future[TaskResult], list[str]]]:
    """Each task with its outcome, as they are done, and what is being measured meanwhile."""
    engine = executor if isinstance(executor, Engine) else Engine
    flying: dict[Future[TaskResult], Task] = {}
    done: SimpleQueue[Future[TaskResult]] = SimpleQueue()

    def landed() -> tuple[Task, Future[TaskResult], list[str]]:
        future = done.get()
        task = flying.pop(future)
        some = flying.items() if len(flying) <= Engine.in_hand else ()
        return task, future, list(dict.fromkeys(name(other) for one, other in some if one.running()))

    def name(task: Task) -> str:
        return f"{task.measurement.run.name}/{task.measurement.path.name}"

    try:
        for task in tasks:
            future = executor.submit(execute, task)
            flying[future] = task
            future.add_done_callback(done.put)
            while not done.empty() or len(flying) >= engine.in_hand:
                yield landed()
        while flying:
            yield landed()
    finally:
        for future in flying:
            future.cancel()


def _flush(writer: store.Writer, measurements: Iterable[PlannedMeasurement], report: Fault) -> None:
    for measurement in measurements:
        with going_on(partial(report, measurement.path), f"'{measurement.path}'"):
            writer.flush(measurement)
