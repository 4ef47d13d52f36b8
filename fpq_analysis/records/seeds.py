"""Runs that differ in nothing but their training seed: which they are, their mean, and its interval."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fpq_analysis.intervals import crossed, over_seeds
from fpq_analysis.records.comparison import MIN_SEEDS
from fpq_analysis.records.queries import half_widths, ordered

SEED = re.compile(r"(?<![a-z])(?:seed|s)[-_=]?\d+(?![a-z0-9])", re.IGNORECASE)  # in a run's name


@dataclass(frozen=True)
class Curve:
    """One quantity of runs that differ by their training seed alone, against an epoch or another number.

    Attributes:
        first: a row, for what all rows have in common.
        runs: of each run its rows, in the order of `x`.
        x: where every run has a value; where there is no such place, wherever one has.
        value: mean over the runs.
        half: half of its 95 % interval, 0 where it is unknown: over seeds and samples from three runs on (over the
            seeds where single samples were not kept); over the samples alone for fewer.
    """

    first: pd.Series
    runs: Sequence[pd.DataFrame]
    x: np.ndarray
    value: np.ndarray
    half: np.ndarray

    def last(self) -> Curve:
        """Of the curve and of each run, the last place alone."""
        ends = {name: getattr(self, name)[-1:] for name in ("x", "value", "half")}
        return replace(self, runs=[run.tail(1) for run in self.runs], **ends)

    @property
    def low(self) -> np.ndarray:
        """Lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> np.ndarray:
        """Upper end of the interval."""
        return self.value + self.half


def families(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows of runs that differ by their training seed alone, in the one order of figures.

    Equal in network, data, method and bits, and each with a seed of its own.  Where a seed occurs twice, the runs
    differ in more than it: then those belong together whose names, without the seed, are the same.
    """
    rows = ordered(rows)
    for _, alike in rows.groupby(["model", "dataset", "data", "method", "bits"], sort=False, dropna=False):
        if _of_seeds(alike):
            yield alike
            continue
        for _, named in alike.groupby(alike["run"].map(lambda run: SEED.sub("", str(run))), sort=False):
            yield from [named] if _of_seeds(named) else (run for _, run in named.groupby("run", sort=False))


def _of_seeds(rows: pd.DataFrame) -> bool:
    """Whether no two runs have one seed."""
    return rows["train_seed"].nunique() == rows["run"].nunique()


def curve(rows: pd.DataFrame, along: str = "epoch") -> Curve:
    """The curve of one family's rows of one quantity, with at most one row a run and place along the axis."""
    runs = [run.sort_values(along, kind="stable") for _, run in rows.groupby("run", sort=False)]
    places = [set(run[along]) for run in runs]
    common = sorted(set.intersection(*places)) or sorted(set.union(*places))
    found = [interval(rows[rows[along] == x].drop_duplicates("run", keep="last")) for x in common]
    value, half = np.array(found, dtype=float).reshape(-1, 2).T
    return Curve(rows.iloc[0], runs, np.array(common), value, half)


def interval(rows: pd.DataFrame) -> tuple[float, float]:
    """Mean over rows that differ by their training seed, and half of its 95 % interval; see `Curve`."""
    values, halves = rows["value"].to_numpy(float), half_widths(rows).to_numpy(float)
    value, enough = float(values.mean()), len(rows) >= MIN_SEEDS
    if len(rows) < 2:
        return value, float(halves[0])
    if all(map(_by_sample, rows.itertuples(index=False))) and rows["n_data"].nunique() == 1:
        both = crossed(np.stack(rows["samples"].tolist()))
        return value, both.ci95 if enough else both.ci95_images
    # The runs saw the same samples, so their errors over these do not average out.
    return value, over_seeds(list(values))[1] if enough else float(halves.mean())


def _by_sample(row: object) -> bool:
    """Whether a row keeps its parts, one a sample, of which the value is the mean."""
    samples, n_data, value = (getattr(row, name) for name in ("samples", "n_data", "value"))
    if not isinstance(samples, list) or len(samples) != n_data or len(samples) < 2:
        return False
    return math.isclose(float(np.mean(samples)), value, rel_tol=1e-3, abs_tol=1e-12)


def interval_words(rows: pd.DataFrame, what: str = "the samples") -> str:
    """What the bands or bars of these rows' curves are, as sentences for a caption.

    Args:
        what: one run's own interval is over; empty if it has none.
    """
    numbers = sorted({family["run"].nunique() for family in families(rows)})
    few, many = numbers[0] < MIN_SEEDS, numbers[-1] >= MIN_SEEDS
    beyond = (
        " One that reaches the edge of its panel goes on." if (half_widths(rows) > 0.7 * rows["value"]).any() else ""
    )
    seeds = " or ".join(str(n) for n in numbers if n > 1)
    text = f"Thick lines: mean over {seeds} training seeds; thin ones: each of them." if seeds else ""
    if not what:
        return f"{text} Bands: 95 % Student interval over the seeds.{beyond}" if many else text
    text = f"{text} Bands and bars: 95 % interval over".strip()
    if not many:
        alone = (
            f"{what} alone, as one over seeds takes {MIN_SEEDS} or more" if seeds else f"{what}, not over training runs"
        )
        return f"{text} {alone}.{beyond}"
    return f"{text} seeds and {what}{f'; over {what} alone below {MIN_SEEDS} seeds' if few else ''}.{beyond}"
