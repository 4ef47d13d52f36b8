"""Tidy rows of what was measured: one JSON object a line, appended, one file a probe and run.

`<run>/records/<probe>.jsonl`; a measurement is the rows with one `key`.  The final row of each write has
their number in `last`, so that a write torn off by a kill is noticed and measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from fpq_analysis.errors import Fault, UserError, going_on, raise_fault
from fpq_analysis.files import append_jsonl, read_lines, write_text
from fpq_analysis.schema import RecordRow, fits
from fpq_analysis.text import printable

# Columns, in order, of every table of records.
COLUMNS = {
    "run": "the run's folder, as seen from the folder asked for (known when reading, not stored)",
    "method": "training method",
    "model": "network",
    "factory": "hash of the code that makes it, see `factories.source_hash`; None for a network of this package",
    "dataset": "data it was trained and measured on",
    "data": "fingerprint of these data: equal only if every sample is",
    "bits": "WxAy, or FP",
    "train_seed": "seed of the training run; with checkpoints of other programs text, as theirs is `unknown`",
    "epoch": "finished epochs; 0 is before training",
    "checkpoint": "SHA-256 of the file",
    "probe": "which measurement",
    "definition": "which Hessian of a quantized network: dequantized, latent, float",
    "loss": "name of the loss; `cross_entropy` in older records, which do not store it",
    "estimator": "how it was computed",
    "layer": "layer's name, or all",
    "quantity": "what the value is",
    "value": "the number; None if it is not finite",
    "sem": "standard error from random probes or labels, for these data; 0 when exact",
    "sem_data": "standard error over the data, random labels included; None if unknown",
    "ci95": "half of the 95 % interval: over the data where that error is known, otherwise over the probes",
    "n_data": "samples",
    "n_products": "backward passes or Hessian-vector products over them",
    "seed": "of the sample and of the probes",
    "settings": "hash of probe, its version and settings, sample and seed: what may be drawn in one figure",
    "key": "hash of checkpoint, epoch, network, probe, its version and settings, and data: what makes two measurements "
    "the same",
    "status": "ok, or what is wrong",
    "last": "on the final row of each write, how many rows were written; an incomplete write is measured again",
    "package": "version of fpq-analysis that measured; like the next three, None in older records",
    "torch": "version of torch",
    "device": "where it was computed: cpu, cuda, ...",
    "dtype": "of the weights in the file, and where it is another, what they were measured in",
    "through": "of a landscape through several checkpoints, the others' hashes",
    "seconds": "time of the whole measurement",
    "samples": "the parts of the value: for each sample alone, in the order of the draw (paired comparisons), or for "
    "each channel, node or bin, as the quantity says; None if unknown",
}


NO_SEED = "unknown"  # what stands in tables for the seed of another program's run
NUMBERS = ("value", "sem", "sem_data", "ci95", "seconds")


def measurement_key(checkpoint: str, probe: str, settings: dict[str, Any]) -> str:
    """Short hash of everything that decides a measurement's result."""
    return _short_hash([checkpoint, probe, settings])


def settings_key(probe: str, settings: dict[str, Any]) -> str:
    """The same for all checkpoints measured alike."""
    return _short_hash([probe, settings])


def _short_hash(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def append(run: Path, probe: str, rows: Iterable[dict[str, Any]]) -> None:
    """Add one measurement's rows in one write; a non-finite number becomes None with a status that says so."""
    rows = [_clean(row) for row in rows]
    rows[-1]["last"] = len(rows)
    try:
        append_jsonl(_file(run, probe), rows)
    except UserError as error:
        raise UserError(f"{error} Measurements can be kept outside of the runs: --records DIR.") from error


def _clean(row: dict[str, Any]) -> dict[str, Any]:
    full = {column: row.get(column) for column in COLUMNS}
    full["status"] = row.get("status", "ok")
    full["last"] = None  # of a row that was read and is written again, it counts other rows
    for column in NUMBERS:
        number = full[column]
        if isinstance(number, float) and not math.isfinite(number):
            full[column] = None
            if column == "value":
                full["status"] = f"not finite ({number})"
    if full["samples"] is not None and not all(math.isfinite(sample) for sample in full["samples"]):
        full["samples"] = None
    return full


def done(run: Path, probe: str) -> set[str]:
    """Keys of the complete measurements."""
    return {row["key"] for row in read_rows(_file(run, probe))}


def drop_after(run: Path, probe: str, epoch: int) -> None:
    """Remove the measurements of later epochs."""
    path = _file(run, probe)
    rows = read_rows(path)
    late = {row["key"] for row in rows if row["epoch"] > epoch}
    if late:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["key"] not in late))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the whole measurements in a file.

    Rows are written a measurement at a time, and the last says how many they are: where one is torn off, damaged, or
    is not a `schema.RecordRow`, all of that time are left out, and measured again.
    """
    rows = read_lines(path)
    good = [row is not None and fits(RecordRow, row) for row in rows]
    whole: list[dict[str, Any]] = []
    begin = 0  # where what is written together may begin
    for end, row in enumerate(rows, 1):
        number = row.get("last") if row and good[end - 1] else None
        if not row or not number:
            continue
        if isinstance(number, int) and number is not True and end - number >= begin:
            begin = end - number
        elif number is True:  # in files older than 0.1
            while begin < end and not (good[begin] and (rows[begin] or {})["key"] == row["key"]):
                begin += 1
        else:
            begin = end
        group = [one for one in rows[begin:end] if one]
        if all(good[begin:end]) and all(one["key"] == row["key"] for one in group):
            whole += group
        begin = end
    return whole


def read(
    root: Path, runs: Iterable[Path], probe: str, keys: set[str] | None = None, on_fault: Fault = raise_fault
) -> pd.DataFrame:
    """All complete measurements of one probe on the given runs; of repeated ones the newest.

    Args:
        root: folder from which runs are named.
        keys: only these measurements; None for all.
        on_fault: called with each run whose records cannot be read and why; the others' are.

    Returns:
        A table with the columns of `COLUMNS`, by run and epoch; empty if nothing was measured.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        with going_on(partial(on_fault, run), f"'{run}'"):
            name, found = run_name(root, run), read_rows(_file(run, probe))
            rows += [{**row, "run": name} for row in found if keys is None or row["key"] in keys]
    if not all(isinstance(row.get("train_seed"), int) for row in rows):
        # Text then for all: captions sort and print seeds, and a column of numbers would turn 0 into 0.0.
        rows = [{**row, "train_seed": _text(row.get("train_seed"))} for row in rows]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in NUMBERS:
        frame[column] = frame[column].astype(float)
    frame["loss"] = frame["loss"].fillna("cross_entropy")
    frame = frame.drop_duplicates(["run", "key", "layer", "quantity"], keep="last")
    return frame.sort_values(["run", "epoch"], kind="stable", ignore_index=True)


def _text(seed: int | str | None) -> str:
    return NO_SEED if seed is None else str(seed)


def load(root: str | os.PathLike[str], probe: str, on_fault: Fault = raise_fault) -> pd.DataFrame:
    """What was measured by `probe` at or below `root`, from the records alone: no checkpoint is needed.

    A figure must not mix settings.  For each definition of the Hessian, those that most checkpoints were measured with
    are kept, and of several such ones the newest; of an epoch that was measured several times with these (of another
    factory of the network, or by an older version), the newest measurement.

    Args:
        on_fault: see `read`.

    Returns:
        As `read`; empty if there are no such records.
    """
    root = Path(root)
    runs = sorted(path.parent.parent for path in root.rglob(f"records/{probe}.jsonl"))
    frame = read(root, runs, probe, on_fault=on_fault)
    measured = frame.drop_duplicates(["run", "key"], keep="last")
    newest = measured.drop_duplicates(["run", "settings", "epoch", "through"], keep="last")
    frame = frame.merge(newest[["run", "key"]], on=["run", "key"])
    kept = []
    for _, rows in frame.groupby(frame["definition"].fillna(""), sort=False):
        measurements = rows.groupby("settings", sort=False)["key"].nunique()  # rows may speak of other checkpoints too
        most = measurements[measurements == measurements.max()].index
        kept.append(rows[rows["settings"] == rows.loc[rows["settings"].isin(most), "settings"].iloc[-1]])
    return pd.concat(kept).sort_index(ignore_index=True) if kept else frame


def home(root: Path, run: Path, kept: str | os.PathLike[str] | None) -> Path:
    """The folder whose `records/` holds those of a run: the run's own, or one of its name below `kept`."""
    return run if kept is None else Path(kept) / run_name(root, run)


def run_name(root: Path, run: Path) -> str:
    """`run` as seen from `root`, fit to be shown; its own name if it is the root."""
    run, root = run.resolve(), root.resolve()
    return printable(run.name if run == root else str(run.relative_to(root)))


def _file(run: Path, probe: str) -> Path:
    return run / "records" / f"{probe}.jsonl"
