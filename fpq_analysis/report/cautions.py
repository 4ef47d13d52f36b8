"""What a reader should know before trusting the page."""

from __future__ import annotations

import pandas as pd

from fpq_analysis import records
from fpq_analysis.errors import going_on
from fpq_analysis.files import read_lines
from fpq_analysis.records.queries import marked
from fpq_analysis.report.study import Study
from fpq_analysis.runs import Run


def cautions(study: Study) -> list[str]:
    """What a reader should know before trusting the page: damage, unfinished runs, stale or odd records."""
    notes = list(study.faults)
    for run in study.runs:
        if run.stopped:
            notes.append(f"{run.name} is not finished: {run.last_epoch or 0} of {run.config.get('epochs')} epochs.")
    for run in study.runs:
        last = study.last_trace(run)
        if last is not None and run.last_epoch is not None and last["epoch"] < run.last_epoch:
            notes.append(
                f"{run.name}: the trace was measured up to epoch {last['epoch']}, training went to {run.last_epoch}."
            )
    for path in sorted(study.kept.rglob("records/*.jsonl")):
        with going_on(lambda fault: None, str(path)):  # one that cannot be read is among the faults
            if damaged := read_lines(path).count(None):
                lines = "line is" if damaged == 1 else "lines are"
                notes.append(f"'{path}': {damaged} damaged {lines} left out; its command measures what lacks.")
    folders = {run.name: run for run in study.runs}
    for probe in study.probes:
        frame = study.records(probe)
        for status, rows in marked(frame).groupby("status"):
            notes.append(f"{probe}: {len(rows)} numbers are marked '{status}'.")
        gone = sum(_is_gone(row, folders) for _, row in frame.drop_duplicates(["run", "checkpoint"]).iterrows())
        if gone:
            notes.append(
                f"{probe}: {gone} measurements are of checkpoints that are no longer there (by their SHA-256). Were "
                "the runs trained anew? Then measure them again."
            )
        every = records.read(study.kept, [study.kept / name for name in folders], probe, on_fault=study.left_out)
        hidden = every["settings"].nunique() - frame["settings"].nunique()
        if hidden > 0:
            notes.append(
                f"{probe}: the records also hold measurements with other settings (samples, seed or method), which are "
                "not shown here."
            )
    return notes


def _is_gone(row: pd.Series, runs: dict[str, Run]) -> bool:
    run = runs.get(str(row["run"]))
    return run is not None and bool(run.manifest) and row["checkpoint"] not in run.manifest.values()
