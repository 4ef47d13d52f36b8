"""What lies on disk of a set of runs: `run.json`, `train.jsonl`, manifests and records.  No checkpoint is opened.

Checkpoints of other programs leave records alone; what these say of the run stands in for its `run.json`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fpq_analysis import records
from fpq_analysis.errors import UserError, going_on
from fpq_analysis.methods import method_rank
from fpq_analysis.records.queries import totals
from fpq_analysis.runs import read_manifest, read_run, read_training

# Which Hessian is spoken of where only one can be.
DEFINITIONS = ("dequantized", "float", "latent")
# Not settings of a run: where things lay on one machine.
PLACES = ("init", "data_root")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: its folder, as seen from the folder asked for.
        config, data, versions, started, teacher: from `run.json`; `teacher` is the SHA-256 it started from.  Of a run
            of another program only what its records hold.
        epochs: the rows of `train.jsonl`, by epoch.
        manifest: file name to SHA-256.
    """

    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    started: str
    teacher: str | None
    epochs: list[dict[str, Any]]
    manifest: dict[str, str]

    @property
    def method(self) -> str:
        """Key of the training method."""
        return str(self.config.get("method", ""))

    @property
    def model(self) -> str:
        """Name of the network."""
        return str(self.config.get("model", ""))

    @property
    def dataset(self) -> str:
        """Name of the data."""
        return str(self.data.get("name", self.config.get("data", "")))

    @property
    def bits(self) -> str:
        """`WxAy`, or `FP`."""
        return str(self.config.get("bits") or "FP").upper()  # None for a float run of ours

    @property
    def seed(self) -> int | None:
        """Seed of the training."""
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def group(self) -> tuple[str, str, str]:
        """What runs must share to be compared: folder, network, data."""
        return self.name.rpartition("/")[0], self.model, str(self.data.get("fingerprint", self.dataset))

    @property
    def kind(self) -> str:
        """Equal for runs that differ in nothing but the seed."""
        settings = {key: value for key, value in self.config.items() if key not in ("seed", *PLACES)}
        return json.dumps(settings, sort_keys=True)

    @property
    def last_epoch(self) -> int | None:
        """Number of finished epochs."""
        return int(self.epochs[-1]["epoch"]) if self.epochs else None

    @property
    def finished(self) -> bool:
        """Whether it was trained to the end."""
        return self.last_epoch is not None and self.last_epoch == self.config.get("epochs")

    @property
    def stopped(self) -> bool:
        """Whether it was begun here and not trained to the end."""
        return "epochs" in self.config and not self.finished

    @property
    def last_accuracy(self) -> float | None:
        """Test accuracy after the last epoch, from 0 to 1."""
        return number_of(self.epochs[-1], "test_accuracy") if self.epochs else None

    @property
    def best_accuracy(self) -> float | None:
        """Of any epoch: chosen on the test images, so too high."""
        found = [value for row in self.epochs if (value := number_of(row, "test_accuracy")) is not None]
        return max(found, default=None)

    @property
    def clipped(self) -> float | None:
        """Share of the weights outside their grid after the last epoch; None for a float network."""
        return number_of(self.epochs[-1], "clipped_fraction") if self.epochs and self.bits != "FP" else None

    @property
    def seconds(self) -> float | None:
        """Time of all epochs' training steps."""
        found = [value for row in self.epochs if (value := number_of(row, "seconds")) is not None]
        return sum(found) if found else None

    @property
    def checkpoint(self) -> str | None:
        """SHA-256 of the newest checkpoint."""
        names = sorted(self.manifest, key=lambda name: (len(name), name))  # epoch_10000.pt is after epoch_9999.pt
        return self.manifest[names[-1]] if names else None

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts runs for a reader: by data and network, float first, more bits first."""
        bits = [-int(digits) for digits in re.findall(r"\d+", self.bits)]
        place = method_rank(self.method)
        return (self.dataset, self.model, bits, place, self.method, self.kind, self.seed or 0, self.name)


@dataclass(frozen=True)
class Study:
    """All runs at or below a folder, with what was measured of them.

    Attributes:
        root: the folder.
        runs: in a reader's order.
        faults: sentences about files that could not be read.
        kept: the folder whose records these are: the same, or where else they are kept.
    """

    root: Path
    runs: list[Run]
    faults: list[str]
    kept: Path
    _frames: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    def records(self, probe: str) -> pd.DataFrame:
        """The records of one probe, of settings that may stand in one figure; see `records.load`."""
        if probe not in self._frames:
            self._frames[probe] = records.load(self.kept, probe)
        return self._frames[probe]

    @cached_property
    def probes(self) -> list[str]:
        """All probes there are complete records of."""
        names = sorted({path.stem for path in self.kept.rglob("records/*.jsonl")})
        return [name for name in names if len(self.records(name))]

    @cached_property
    def traces(self) -> pd.DataFrame:
        """Whole-network traces."""
        return totals(self.records("hessian_trace"))

    @property
    def definition(self) -> str | None:
        """The definition of the Hessian spoken of where only one can be; None if no trace was measured."""
        known = set(self.traces["definition"])
        return next((name for name in DEFINITIONS if name in known), None)

    def run(self, name: str) -> Run | None:
        """The run of that name."""
        return next((run for run in self.runs if run.name == name), None)

    def last_trace(self, run: Run) -> pd.Series | None:
        """The trace at the last epoch measured, under `definition`."""
        rows = self.traces[(self.traces["run"] == run.name) & (self.traces["definition"] == self.definition)]
        return None if rows.empty else rows.sort_values("epoch", kind="stable").iloc[-1]


def read_study(root: str | Path, kept: str | Path | None = None) -> Study:
    """Every run at or below `root`, found by its `run.json` or its records.

    Args:
        kept: see `write_report`.

    Raises:
        UserError: if the folder does not exist, or holds no run that can be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"No folder '{root}'. Give --ckpt-dir a run, or a folder of runs; 'fpq-analyze train' makes one."
        )
    folders = {path.parent for path in root.rglob("run.json")}
    kept = root if kept is None else Path(kept)
    named = {records.run_name(kept, path.parent.parent): path.parent.parent for path in kept.rglob("records/*.jsonl")}
    named |= {records.run_name(root, folder): folder for folder in folders}
    runs, faults = [], []
    for name, folder in sorted(named.items()):
        with going_on(lambda fault, name=name: faults.append(f"{name} is left out: {fault}"), name):  # type: ignore[misc]
            about = read_run(folder) if (folder / "run.json").exists() else _from_records(folder)
            if about is None:
                continue
            runs.append(
                Run(
                    name,
                    about["config"],
                    about["data"],
                    about.get("versions", {}),
                    about.get("started", ""),
                    about.get("teacher"),
                    read_training(folder),
                    read_manifest(folder),
                )
            )
    if not runs:
        raise UserError(
            f"'{root}' holds no run (a folder with a run.json), nor does any folder below it. "
            + (faults[0] if faults else "'fpq-analyze train' or 'fpq-analyze demo' makes some.")
        )
    return Study(root, sorted(runs, key=lambda run: run.order), faults, kept)


def number_of(row: dict[str, Any], key: str) -> float | None:
    """The finite number under `key`, or None."""
    value = row.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def _from_records(folder: Path) -> dict[str, Any] | None:
    """What a run's records say of it, in the form of `run.json`; None if they say nothing."""
    for path in sorted((folder / "records").glob("*.jsonl")):
        for row in records.read_rows(path)[:1]:
            config = {key: row.get(key) for key in ("method", "model", "bits")}
            data = {"name": row.get("dataset"), "fingerprint": row.get("data")}
            return {"config": {**config, "seed": row.get("train_seed")}, "data": data}
    return None
