"""The records of a command on disk: which file they stand in, and when rows are written.

A shard writes a file of its own, `<probe>.IofN.jsonl`, so that no two processes ever write to one; the next command
without a shard moves its rows into the run's own file, `<probe>.jsonl`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fpq_analysis import records as rec
from fpq_analysis.errors import Fault, UserError
from fpq_analysis.pipeline.task import WHOLE, PlannedMeasurement, Shard, TaskResult

# Seconds of work that a kill may cost; writing every piece at once would cost a fast device more than the work itself.
FLUSH = 2.0
# Quantities that check that pieces belong to the same measurement (of a landscape: that its directions agree).
SIGNATURE = "signature_"
SAME = 1e-2  # two computations of one thing agree better than this in its signature

Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]  # by layer and quantity


def recorded(home: Path, probe: str) -> dict[str, dict[str, float]]:
    """Of each key in a run's records, shards included: the quantities of the whole network, and their values."""
    found: dict[str, dict[str, float]] = {}
    for name in [probe, *_shards(home, probe)]:
        for key, rows in _by_key(home, name).items():
            whole = {quantity: row["value"] for (layer, quantity), row in rows.items() if layer == "all"}
            found.setdefault(key, {}).update(whole)
    return found


def read(root: Path, homes: Iterable[Path], probe: str, keys: set[str], on_fault: Fault) -> pd.DataFrame:
    """The rows of these measurements, shards included; see `records.read`."""
    homes = list(homes)
    names = dict.fromkeys([probe, *(name for home in homes for name in _shards(home, probe))])
    frames = [rec.read(root, homes, name, keys, on_fault) for name in names]
    frame = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
    frame = frame.drop_duplicates(["run", "key", "layer", "quantity"], keep="last")
    return frame.sort_values(["run", "epoch"], kind="stable", ignore_index=True)


def gather(home: Path, probe: str, overwrite: bool) -> None:
    """Move what shards have measured into the run's own file, where it takes the place of what stands there.

    Args:
        overwrite: all of it is measured anew, and need not fit together.

    Raises:
        UserError: if their pieces do not fit together, or those that stand there and are not replaced.
    """
    shards = {name: _by_key(home, name) for name in _shards(home, probe)}
    own = _by_key(home, probe) if shards else {}
    found: dict[str, Rows] = {}
    for key in dict.fromkeys(key for rows in shards.values() for key in rows):
        parts = [rows[key] for rows in shards.values() if key in rows]
        found[key] = {place: row for part in parts for place, row in part.items()}
        there = own.get(key, {})
        if not there.keys() <= found[key].keys():
            parts.append(there)
        for part in [] if overwrite else parts[1:]:
            check_same(_signature(parts[0].values()), _signature(part.values()))
    for rows in found.values():
        rec.append(home, probe, rows.values())
    for name in shards:
        _file(home, name).unlink()


def check_same(known: dict[str, float], signature: dict[str, float]) -> None:
    """Raise `UserError` if pieces that were measured with one signature do not fit those of the other."""
    for name, value in signature.items():
        was = known.get(name, value)
        if abs(value - was) > SAME * max(1.0, abs(was)):
            raise UserError(
                "The directions of this landscape come out otherwise than when it was begun (another machine or "
                "release of torch, perhaps), so its points would not fit together. Draw it anew with --overwrite, "
                "all shards in one place."
            )


class Writer:
    """Takes results as they come and writes them: measurements when they are whole, pieces every `FLUSH` seconds.

    Attributes:
        written: keys of the measurements of which something was written.
    """

    def __init__(self, probe: str, shard: Shard, measurements: Iterable[PlannedMeasurement]) -> None:
        self.written: set[str] = set()
        self._name = probe if shard == WHOLE else f"{probe}.{shard[0]}of{shard[1]}"
        self._pending = {_identity(measurement): _PendingWrite(measurement) for measurement in measurements}

    def add(self, measurement: PlannedMeasurement, result: TaskResult) -> None:
        """Take the result of one piece.

        Raises:
            UserError: if it does not fit the other pieces, or the machine does not let it be written.
        """
        pending = self._pending[_identity(measurement)]
        signature = _signature(result.notes)
        check_same(pending.known, signature)
        if result.notes and not pending.known:
            pending.known = signature
            pending.waiting += result.notes
        pending.waiting += result.rows
        pending.left -= 1
        if not pending.left or time.monotonic() - pending.written > FLUSH:
            self.flush(measurement)

    def flush(self, measurement: PlannedMeasurement) -> None:
        """Write what waits of a measurement.

        Raises:
            UserError: if the machine does not let it be written.
        """
        pending = self._pending[_identity(measurement)]
        rows, pending.waiting = pending.waiting, []
        if rows:
            rec.append(measurement.home, self._name, rows)
            self.written.add(measurement.key)
        pending.written = time.monotonic()


class _PendingWrite:
    """A measurement that is being written."""

    def __init__(self, measurement: PlannedMeasurement) -> None:
        self.known = measurement.known
        self.left = len(measurement.pieces)
        self.waiting: list[Row] = []
        self.written = time.monotonic()


def _identity(measurement: PlannedMeasurement) -> tuple[Path, str]:
    return measurement.home, measurement.key  # of a run that was copied the keys are the same


def _shards(home: Path, probe: str) -> list[str]:
    """Names of the files of shards, without suffix."""
    return sorted(path.stem for path in (home / "records").glob(f"{probe}.*of*.jsonl"))


def _by_key(home: Path, name: str) -> dict[str, Rows]:
    """The rows of each measurement in a file; of repeated ones the newest."""
    found: dict[str, Rows] = {}
    for row in rec.read_rows(_file(home, name)):
        found.setdefault(row["key"], {})[row["layer"], row["quantity"]] = row
    return found


def _signature(rows: Iterable[Row]) -> dict[str, float]:
    return {row["quantity"]: row["value"] for row in rows if row["quantity"].startswith(SIGNATURE)}


def _file(home: Path, name: str) -> Path:
    return home / "records" / f"{name}.jsonl"
