"""Differences between two runs, on the same samples.

Two traces measured on the same samples share most of their error over the data: samples that are sharp for one network
are sharp for the other.  The difference is therefore taken sample by sample, and its interval is that of the mean of
these differences.  It speaks of these two trained networks; how the *methods* differ needs several training seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fpq_analysis.errors import UserError
from fpq_analysis.intervals import Z95, Crossed, crossed, half_interval, over_seeds
from fpq_analysis.methods import BASELINE
from fpq_analysis.records.table import NO_SEED
from fpq_analysis.text import number


@dataclass(frozen=True)
class Difference:
    """`run` minus `baseline` at one epoch.

    Attributes:
        value: difference of the traces.
        sem: its standard error over the samples; that of the random probes, for these samples, if `over_probes`.
        baseline_value: the baseline's trace.
        gaps: sample by sample, where single samples were seen: the difference is paired then.
        over_probes: whether how the traces depend on the samples is not known.
    """

    run: str
    baseline: str
    epoch: int
    value: float
    sem: float
    baseline_value: float
    gaps: np.ndarray | None = field(default=None, repr=False)
    over_probes: bool = False

    @property
    def paired(self) -> bool:
        """Whether the difference was taken sample by sample."""
        return self.gaps is not None

    @property
    def ci95(self) -> float:
        """Half of the 95 % interval: Student's over the samples."""
        return Z95 * self.sem if self.gaps is None else half_interval(self.sem, len(self.gaps) - 1)

    def as_row(self) -> dict[str, Any]:
        """Of a table: everything but the single samples."""
        row = asdict(self) | {"ci95": self.ci95, "paired": self.paired}
        del row["gaps"]
        return row

    def sentence(self, what: str = "trace") -> str:
        """The difference of `what` in plain words, with its 95 % interval."""
        half = self.ci95
        where = f"at epoch {self.epoch}"
        percent = _percent(self.value, self.baseline_value)
        word = "lower" if self.value < 0 else "higher"
        if math.isnan(half):
            return (
                f"The {what} of {self.run} is {number(abs(self.value), 3)} {word} than that of {self.baseline} {where} "
                f"({percent}); from so few samples the error is not known."
            )
        if abs(self.value) <= half:
            sign = "+" if self.value > 0 else ""
            return (
                f"The {what} of {self.run} and that of {self.baseline} do not differ measurably {where}: "
                f"{sign}{number(self.value, 3)} ± {number(half, 2)} ({percent})."
            )
        return (
            f"The {what} of {self.run} is {number(abs(self.value), 3)} ± {number(half, 2)} {word} than that of "
            f"{self.baseline} {where} ({percent})."
        )


MIN_SEEDS = 3  # of an interval over seeds: with two, Student's t is 12.7
NOTEWORTHY = 10  # per cent: the difference of which it is said how many seeds it would need


@dataclass(frozen=True)
class SeedsDifference:
    """The same difference for several training seeds, on the same samples.

    Attributes:
        each: one difference for every seed.
        crossed: their mean, with its errors; None where single samples were not seen, or other samples for each seed.
    """

    each: Sequence[Difference]
    crossed: Crossed | None

    @classmethod
    def of(cls, each: Sequence[Difference]) -> SeedsDifference:
        """From at least two differences of runs that differ in nothing but their training seed."""
        gaps = [d.gaps for d in each if d.gaps is not None]
        whole = len(gaps) == len(each) and len({len(g) for g in gaps}) == 1
        return cls(each, crossed(np.stack(gaps)) if whole else None)

    @property
    def baseline_value(self) -> float:
        """The baseline's mean trace."""
        return float(np.mean([d.baseline_value for d in self.each]))

    def as_row(self) -> dict[str, Any]:
        """Of a table: the mean difference, with its interval over seeds and samples, and over the samples alone."""
        first, mean = self.each[0], self.crossed
        row: dict[str, Any] = {"run": first.run, "baseline": first.baseline, "epoch": first.epoch}
        row |= {"n_seeds": len(self.each), "baseline_value": self.baseline_value}
        if mean is None:
            value, half = over_seeds([d.value for d in self.each])
            return row | {"value": value, "ci95": half, "paired": False}
        return row | {"value": mean.value, "ci95": mean.ci95, "ci95_images": mean.ci95_images, "paired": True}

    def sentence(self, ours: str, theirs: str, what: str = "trace") -> str:
        """The mean difference of `what` in plain words, with its interval over seeds and that over the samples alone.

        Args:
            ours, theirs: what the two kinds of runs are called.
        """
        if self.crossed is None:
            value, half = over_seeds([d.value for d in self.each])
            errors = "95 % Student interval over the seeds"
        else:
            value, half = self.crossed.value, self.crossed.ci95
            errors = f"over these samples alone ± {number(self.crossed.ci95_images, 2)}"
            if len(self.each) < MIN_SEEDS:
                half = self.crossed.ci95_images
                errors = f"over these samples alone, as an interval over seeds takes {MIN_SEEDS} or more"
        base = self.baseline_value
        percent = _percent(value, base)
        how = f"is lower by {number(-value, 3)}" if value < 0 else f"is higher by {number(value, 3)}"
        if abs(value) <= half:
            how = f"does not differ measurably: {'+' if value > 0 else ''}{number(value, 3)}"
        return (
            f"{ours} against {theirs}, over {len(self.each)} training seeds: the {what} {how} ± {number(half, 2)} on "
            f"average ({percent}; {errors}).{self._needed()}"
        )

    def _needed(self) -> str:
        if self.crossed is None or len(self.each) < MIN_SEEDS or not self.baseline_value:
            return ""
        needed = self.crossed.seeds_needed(NOTEWORTHY / 100 * abs(self.baseline_value))
        if needed is None:
            return f" To see a difference of {NOTEWORTHY} %, more samples are needed, whatever the number of seeds."
        return f" A difference of {NOTEWORTHY} % would show with {needed} seeds." if needed > len(self.each) else ""


def _percent(value: float, base: float) -> str:
    share = f"{100 * abs(value / base):.0f} % " if base else ""
    return f"{share}of {number(base, 3)}"


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
    """Between two rows of records with equal settings: paired by sample where both have `samples`.

    Without these, the errors of the two are taken as independent, which is the wider interval: over the data where
    both are known, else over the random probes, for these samples.
    """
    pairs = ours["samples"], theirs["samples"]
    gaps, here = None, False
    if all(isinstance(samples, list) for samples in pairs) and len(pairs[0]) == len(pairs[1]):
        gaps = np.asarray(pairs[0]) - np.asarray(pairs[1])
        value = float(gaps.mean())
        sem = float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    else:
        here = any(pd.isna(row["sem_data"]) for row in (ours, theirs))
        halves = [Z95 * row["sem"] if here and pd.notna(row["sem_data"]) else row["ci95"] for row in (ours, theirs)]
        value, sem = ours["value"] - theirs["value"], math.hypot(*halves) / Z95
    return Difference(
        str(ours["run"]), str(theirs["run"]), int(ours["epoch"]), float(value), sem, float(theirs["value"]), gaps, here
    )


def alike(ours: pd.DataFrame, theirs: pd.DataFrame, n_data: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of two runs' whole-network traces on record those that were measured alike: with one setting, on one sample.

    Where several are, those on the sample of this number and seed; and of these, or without any, those of most epochs,
    the newest last.

    Raises:
        UserError: if there are none.
    """
    for same in (["settings"], ["n_data", "seed"]):  # another definition of a float network has other settings
        pairs = [
            (a, b)
            for value, b in theirs.groupby(same, sort=False)
            for key, a in ours.groupby(same, sort=False)
            if key == value and set(a["epoch"]) & set(b["epoch"])
        ]
        if pairs:
            return max(
                reversed(pairs),
                key=lambda pair: (
                    (pair[0]["n_data"].iloc[0], pair[0]["seed"].iloc[0]) == (n_data, seed),
                    len(set(pair[0]["epoch"]) & set(pair[1]["epoch"])),
                ),
            )
    samples = [
        " and ".join(f"{n} by --seed {s}" for n, s in sorted(set(zip(rows["n_data"], rows["seed"], strict=True))))
        for rows in (ours, theirs)
    ]
    raise UserError(
        f"{ours['run'].iloc[0]} and {theirs['run'].iloc[0]} have no epoch that was measured on the same samples: on "
        f"record are {samples[0]}, and {samples[1]}. Measure both alike."
    )


def by_epoch(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[Difference]:
    """At every epoch both were measured at, from whole-network traces of one setting each.

    Raises:
        UserError: if the two were not measured on the same samples, or have no epoch in common.
    """
    if set(ours["data"]) != set(theirs["data"]):
        raise UserError(
            f"{ours['run'].iloc[0]} and {theirs['run'].iloc[0]} were trained on different data, so there are no common "
            "samples to compare them on."
        )
    if any(set(ours[column]) != set(theirs[column]) for column in ("n_data", "seed")):
        raise UserError(
            f"{ours['run'].iloc[0]} and {theirs['run'].iloc[0]} were measured on different samples (--n-data, --seed). "
            "Measure both on the same."
        )
    a, b = (rows.drop_duplicates("epoch", keep="last").set_index("epoch", drop=False) for rows in (ours, theirs))
    both = [epoch for epoch in a.index if epoch in b.index]
    if not both:
        raise UserError("The two runs have no epoch in common that could be measured.")
    return [difference(a.loc[epoch], b.loc[epoch]) for epoch in both]


def against_baseline(totals: pd.DataFrame, baseline: str = BASELINE) -> list[Difference]:
    """Every quantized run against the baseline method's run beside it, of equal model, data, bits and training seed.

    The last epoch that both were measured at, under equal definition, estimator, samples and seed.

    Args:
        totals: whole-network traces with their `samples`, see `queries.totals`; or another quantity of all networks.
    """
    same = ["model", "data", "bits", "train_seed", "definition", "estimator", "n_data", "seed"]
    rows = totals[totals["samples"].notna() & (totals["bits"] != "FP")]
    rows = rows.assign(folder=[str(run).rpartition("/")[0] for run in rows["run"]])
    found = []
    for _, group in rows.groupby(["folder", *same], sort=False, dropna=False):
        theirs = group[group["method"] == baseline]
        if theirs["run"].nunique() != 1:
            continue
        for _, ours in group[group["method"] != baseline].groupby("run", sort=True):
            found += _at_last(ours, theirs)
    return found


def among_themselves(totals: pd.DataFrame) -> list[Difference]:
    """Runs of another program, whose seeds are not known: each against the first by name that is like it.

    Alike are those of equal network, data, method and bits.  Epoch and samples as in `against_baseline`.
    """
    same = ["model", "data", "method", "bits", "definition", "estimator", "n_data", "seed"]
    rows = totals[totals["samples"].notna() & totals["train_seed"].fillna(NO_SEED).eq(NO_SEED)]
    found = []
    for _, group in rows.groupby(same, sort=False, dropna=False):
        first, *others = (run for _, run in group.groupby("run", sort=True))
        for ours in others:
            found += _at_last(ours, first)
    return found


def _at_last(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[Difference]:
    """Of two runs, at the last epoch that both were measured at; nothing if there is none."""
    both = set(ours["epoch"]) & set(theirs["epoch"])
    a, b = (rows[rows["epoch"] == max(both, default=None)] for rows in (ours, theirs))
    return [difference(a.iloc[-1], b.iloc[-1])] if both else []
