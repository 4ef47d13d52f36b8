"""What a plan will cost: one checkpoint of every run on few images, scaled up."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import groupby

import pandas as pd

from fpq_analysis import records as rec
from fpq_analysis.devices import peak_memory
from fpq_analysis.errors import Fault, going_on, raise_fault
from fpq_analysis.pipeline.execute import begin, forget, images, point_of, read
from fpq_analysis.pipeline.plan import Plan
from fpq_analysis.pipeline.task import Task

# So many images and twice as many are measured: what does not grow with them, the certificate, is told apart.
IMAGES = 64


def forecast(todo: Plan, on_fault: Fault | None = None) -> pd.DataFrame:
    """Time one pending checkpoint of every run on few images and extrapolate; nothing is recorded.

    Args:
        on_fault: called with each checkpoint that cannot be measured and why; the run's next stands in for it.  None:
            raise.

    Returns:
        A row a run: run, pieces to do (checkpoints, or points of a landscape), seconds for all of them, and peak memory
        of this process so far in MB.
    """
    report = on_fault or raise_fault
    for path, fault in todo.faults:
        report(path, fault)
    rows = []
    tasks = {id(task.measurement): task for task in todo.tasks()}  # one of each measurement
    for home, of_run in groupby(tasks.values(), lambda task: task.measurement.home):
        ours = list(of_run)
        for task in ours:
            with going_on(partial(report, task.measurement.path), f"'{task.measurement.path}'"):
                setup, piece = _seconds(task)
                n_pieces = sum(len(task.measurement.pieces) for task in ours)
                seconds = setup * len(ours) + piece * n_pieces
                rows.append((rec.run_name(todo.root, home), n_pieces, seconds, peak_memory()))
                break
    forget()
    return pd.DataFrame(rows, columns=["run", "to do", "seconds", "peak MB"])


def _seconds(task: Task) -> tuple[float, float]:
    """To set the measurement up, and for a piece."""
    n_data = task.sampling.n_data
    few = IMAGES if n_data is None else min(n_data, IMAGES)
    content = read(task)
    point = point_of(replace(task, sampling=replace(task.sampling, n_data=few)), content)
    times = []
    for n in (few, few, 2 * few):  # the first warms up
        batch = images(content, replace(task.sampling, n_data=n))
        start = time.perf_counter()
        pieces = begin(task.probe, replace(point, batches=batch))
        begun = time.perf_counter()
        pieces.measure(task.measurement.pieces[-1])
        times.append((begun - start, time.perf_counter() - begun))
    _, once, twice = times
    more = ((n_data or content.data["n_train"]) - few) / few
    setup, piece = (short + max(0.0, long - short) * more for short, long in zip(once, twice, strict=True))
    return setup, piece
