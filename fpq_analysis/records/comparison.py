"""Differences between two runs, on the same images.

Two traces measured on the same images share most of their error over the data: images that are sharp for one network
are sharp for the other.  The difference is therefore taken image by image, and its interval is that of the mean of
these differences.  It speaks of these two trained networks; how the *methods* differ needs several training seeds.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fpq_analysis.errors import UserError
from fpq_analysis.intervals import Z95
from fpq_analysis.methods import BASELINE
from fpq_analysis.text import number


@dataclass(frozen=True)
class Difference:
    """`run` minus `baseline` at one epoch.

    Attributes:
        value: difference of the traces.
        sem: its standard error over the images.
        baseline_value: the baseline's trace.
        paired: whether image by image.
    """

    run: str
    baseline: str
    epoch: int
    value: float
    sem: float
    baseline_value: float
    paired: bool = True

    @property
    def ci95(self) -> float:
        """Half of the 95 % interval."""
        return Z95 * self.sem

    def sentence(self) -> str:
        """The difference in plain words, with its 95 % interval."""
        half = self.ci95
        where = f"at epoch {self.epoch}"
        if abs(self.value) <= half:
            sign = "+" if self.value > 0 else ""
            return (
                f"{self.run} and {self.baseline} do not differ measurably {where}: "
                f"{sign}{number(self.value, 3)} ± {number(half, 2)} of {number(self.baseline_value, 3)}."
            )
        word = "lower" if self.value < 0 else "higher"
        percent = 100 * abs(self.value / self.baseline_value)
        return (
            f"{self.run}'s trace is {number(abs(self.value), 3)} ± {number(half, 2)} {word} than {self.baseline}'s "
            f"{where} ({percent:.0f} % of {number(self.baseline_value, 3)})."
        )


def told_apart(ours: Path, theirs: Path) -> tuple[str, str]:
    """Names of two folders: their own, or as many of the folders around them as it takes to differ.

    Raises:
        UserError: if both are one folder.
    """
    a, b = ours.resolve(), theirs.resolve()
    if a == b:
        raise UserError(f"'{ours}' and '{theirs}' are one run, which differs from itself in nothing. Name two.")
    length = next(n for n in itertools.count(1) if a.parts[-n:] != b.parts[-n:])
    return str(Path(*a.parts[-length:])), str(Path(*b.parts[-length:]))


def difference(ours: pd.Series, theirs: pd.Series) -> Difference:
    """Between two rows of records with equal settings: paired by image where both have `samples`.

    Without these, the errors of the two are taken as independent, which is the wider interval.
    """
    pairs = ours["samples"], theirs["samples"]
    paired = all(isinstance(samples, list) for samples in pairs) and len(pairs[0]) == len(pairs[1])
    if paired:
        gap = np.asarray(pairs[0]) - np.asarray(pairs[1])
        value, sem = float(gap.mean()), float(gap.std(ddof=1)) / math.sqrt(len(gap))
    else:
        value, sem = ours["value"] - theirs["value"], math.hypot(ours["ci95"], theirs["ci95"]) / Z95
    return Difference(
        str(ours["run"]), str(theirs["run"]), int(ours["epoch"]), float(value), sem, float(theirs["value"]), paired
    )


def by_epoch(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[Difference]:
    """At every epoch both were measured at, from whole-network traces of one setting each.

    Raises:
        UserError: if the two were not measured on the same data, or have no epoch in common.
    """
    if set(ours["data"]) != set(theirs["data"]):
        raise UserError(
            f"{ours['run'].iloc[0]} and {theirs['run'].iloc[0]} were trained on different data, so there are no common "
            "images to compare them on."
        )
    a, b = (rows.drop_duplicates("epoch", keep="last").set_index("epoch", drop=False) for rows in (ours, theirs))
    both = [epoch for epoch in a.index if epoch in b.index]
    if not both:
        raise UserError("The two runs have no epoch in common that could be measured.")
    return [difference(a.loc[epoch], b.loc[epoch]) for epoch in both]


def against_baseline(totals: pd.DataFrame, baseline: str = BASELINE) -> list[Difference]:
    """Every quantized run against the baseline method's run beside it, of equal model, data, bits and training seed.

    The last epoch that both were measured at, under equal definition, estimator, images and seed.

    Args:
        totals: whole-network traces with their `samples`, see `queries.totals`.
    """
    same = ["model", "data", "bits", "train_seed", "definition", "estimator", "n_data", "seed"]
    rows = totals[totals["samples"].notna() & (totals["bits"] != "FP")]
    rows = rows.assign(folder=[str(run).rpartition("/")[0] for run in rows["run"]])
    found = []
    for _, group in rows.groupby(["folder", *same], sort=False):
        theirs = group[group["method"] == baseline]
        if theirs["run"].nunique() != 1:
            continue
        for _, ours in group[group["method"] != baseline].groupby("run", sort=True):
            both = sorted(set(ours["epoch"]) & set(theirs["epoch"]))
            if both:
                a = ours[ours["epoch"] == both[-1]].iloc[-1]
                b = theirs[theirs["epoch"] == both[-1]].iloc[-1]
                found.append(difference(a, b))
    return found
