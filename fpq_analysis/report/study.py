"""What lies on disk of a set of runs: `run.json`, `train.jsonl`, manifests and records.  No checkpoint is opened.

Checkpoints of other programs leave records alone; what these say of the run stands in for its `run.json`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fpq_analysis import records
from fpq_analysis.errors import UserError, going_on
from fpq_analysis.measures import MEASURES
from fpq_analysis.methods import method_rank
from fpq_analysis.plots.names import Looks
from fpq_analysis.records.queries import mean_loss, totals
from fpq_analysis.records.seeds import families
from fpq_analysis.runs import Run
from fpq_analysis.text import listed

# Which Hessian is spoken of where only one can be.
DEFINITIONS = ("dequantized", "float", "latent")


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
            self._frames[probe] = records.load(self.kept, probe, self.left_out)
        return self._frames[probe]

    def left_out(self, folder: Path, fault: UserError) -> None:
        """Note, once, that a run's records cannot be read."""
        if str(fault) not in self.faults:
            self.faults.append(str(fault))

    @cached_property
    def probes(self) -> list[str]:
        """All probes there are complete records of, in the catalogue's order."""
        there = {path.stem for path in self.kept.rglob("records/*.jsonl")}
        names = [name for name in MEASURES if name in there] + sorted(there - set(MEASURES))
        return [name for name in names if len(self.records(name))]

    @cached_property
    def traces(self) -> pd.DataFrame:
        """Whole-network traces."""
        return totals(self.records("hessian_trace"))

    @cached_property
    def definition(self) -> str | None:
        """The definition of the Hessian spoken of where only one can be; None if no trace was measured."""
        known = set(self.traces["definition"])
        return next((name for name in DEFINITIONS if name in known), None)

    @property
    def quantized(self) -> bool:
        """Whether any of the networks is."""
        return any(run.bits != "FP" for run in self.runs)

    @property
    def loss(self) -> str:
        """What the loss that was measured is called; empty if nothing was."""
        frames = [self.records(name)[["loss"]] for name in self.probes]
        return mean_loss(pd.concat(frames)) if frames else ""

    @cached_property
    def looks(self) -> Looks:
        """With which colour each run is drawn."""
        columns = ["run", "model", "dataset", "data", "method", "bits", "train_seed", "epoch"]
        rows = [
            (run.name, run.model, run.dataset, str(run.data.get("fingerprint")), run.method, run.bits, run.seed, 0)
            for run in self.runs
        ]
        return Looks(families(pd.DataFrame(rows, columns=columns)))

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
            run = Run(folder, name)
            if not (folder / "run.json").exists():
                if (described := _from_records(folder)) is None:
                    continue
                run = Run(folder, name, described)
            _ = run.about, run.rows, run.manifest  # what cannot be read is left out here
            runs.append(run)
    if not runs:
        raise UserError(
            f"'{root}' holds no run (a folder with a run.json), nor does any folder below it. "
            + (faults[0] if faults else "'fpq-analyze train' or 'fpq-analyze demo' makes some.")
        )
    return Study(root, sorted(runs, key=reading_order), faults, kept)


def seeds_in_words(runs: list[Run]) -> str:
    """The training seeds: `0, 1 and 5`, `0 to 24`; `unknown` where a run does not say."""
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    words = [str(seed) for seed in seeds]
    if len(seeds) > 3 and seeds[-1] - seeds[0] == len(seeds) - 1:
        words = [f"{seeds[0]} to {seeds[-1]}"]
    return listed([*words, *(["unknown"] if any(run.seed is None for run in runs) else [])])


def reading_order(run: Run) -> tuple[Any, ...]:
    """Sorts runs for a reader: by data and network, float first, more bits first."""
    bits = [-int(digits) for digits in re.findall(r"\d+", run.bits)]
    place = method_rank(run.method)
    return (run.dataset, run.model, bits, place, run.method, run.kind, run.seed or 0, run.name)


def _from_records(folder: Path) -> dict[str, Any] | None:
    """What a run's records say of it, in the form of `run.json`; None if they say nothing."""
    for path in sorted((folder / "records").glob("*.jsonl")):
        for row in records.read_rows(path)[:1]:
            config = {key: row.get(key) for key in ("method", "model", "bits")}
            data = {"name": row.get("dataset"), "fingerprint": row.get("data")}
            return {"config": {**config, "seed": row.get("train_seed")}, "data": data}
    return None
