"""Which runs stand against each other, and the differences of their traces on the same samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from fpq_analysis.methods import BASELINE, method_label
from fpq_analysis.records.comparison import Difference, against_baseline, among_themselves, difference
from fpq_analysis.report.cells import plain
from fpq_analysis.report.study import Study, reading_order
from fpq_analysis.runs import PLACES, Run


@dataclass(frozen=True)
class Comparison:
    """The traces of two runs on the same samples.

    Attributes:
        ours, theirs: the runs; the difference is ours minus theirs.
        definition: of the Hessian.
        difference: at `difference.epoch` of ours.
        theirs_epoch: the epoch of theirs.
    """

    ours: Run
    theirs: Run
    definition: str
    difference: Difference
    theirs_epoch: int

    @property
    def sign(self) -> int:
        """-1, 1, or 0 where the 95 % interval holds zero."""
        value, half = self.difference.value, self.difference.ci95
        return 0 if abs(value) <= half else int(math.copysign(1, value))

    @property
    def verdict(self) -> str:
        """The sign in words."""
        return {-1: "lower", 0: "not measurably different", 1: "higher"}[self.sign]


def variant(study: Study, run: Run) -> str:
    """The method's name, with the settings that tell it from the study's other runs of the method."""
    alike = [r for r in study.runs if (r.method, r.model, r.dataset) == (run.method, run.model, run.dataset)]
    keys = [key for key in varying(alike) if key not in ("seed", "bits")]
    extra = ", ".join(f"{key} {plain(run.config.get(key))}" for key in keys)
    return method_label(run.method) + (f" ({extra})" if extra else "")


def varying(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all of the runs, but for places on disk."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [
        key
        for key in keys
        if key not in PLACES and len({json.dumps(run.config.get(key), sort_keys=True) for run in runs}) > 1
    ]


def against_method(study: Study) -> list[Comparison]:
    """Every quantized run against the LSQ run beside it, see `comparison.against_baseline`; under every definition."""
    return _compared(study, partial(against_baseline, baseline=BASELINE))


def among_own(study: Study) -> list[Comparison]:
    """Another program's runs, see `comparison.among_themselves`; under every definition."""
    return _compared(study, among_themselves)


def _compared(study: Study, pairs: Callable[[pd.DataFrame], list[Difference]]) -> list[Comparison]:
    found = []
    for definition, rows in study.traces.groupby("definition", sort=False):
        for gap in pairs(rows):
            ours, theirs = study.run(gap.run), study.run(gap.baseline)
            if ours is not None and theirs is not None:
                found.append(Comparison(ours, theirs, str(definition), gap, gap.epoch))
    return sorted(found, key=lambda c: reading_order(c.ours))


def against_float(study: Study) -> list[Comparison]:
    """Every quantized run's last trace against that of the float checkpoint it started from, on the same samples."""
    found = []
    for definition, rows in study.traces.groupby("definition", sort=False):
        rows = rows[rows["samples"].notna()]
        for run in study.runs:
            ours = rows[rows["run"] == run.name].sort_values("epoch", kind="stable")
            if run.bits == "FP" or run.teacher_sha256 is None or ours.empty:
                continue
            last = ours.iloc[-1]
            same = ["data", "n_data", "seed", "estimator"]
            theirs = rows[(rows["checkpoint"] == run.teacher_sha256) & (rows[same] == last[same]).all(axis=1)]
            start = study.run(str(theirs["run"].iloc[0])) if len(theirs) else None
            if start is not None:
                gap = difference(last, theirs.iloc[0])
                found.append(Comparison(run, start, str(definition), gap, int(theirs["epoch"].iloc[0])))
    return found


def accuracy_pairs(study: Study) -> list[tuple[Run, Run]]:
    """Every finished quantized run with the finished LSQ run of its folder, network, data, bits and seed."""
    found = []
    done = [run for run in study.runs if run.finished and run.bits != "FP" and run.last_accuracy is not None]
    for run in done:
        alike = [r for r in done if (r.group, r.bits, r.seed) == (run.group, run.bits, run.seed)]
        theirs = [r for r in alike if r.method == BASELINE]
        if run.method != BASELINE and len(theirs) == 1:
            found.append((run, theirs[0]))
    return found
