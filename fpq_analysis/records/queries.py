"""Which rows of a table of records hold what: for figures, tables and text alike."""

from __future__ import annotations

import math

import pandas as pd

from fpq_analysis.choices import DATASETS
from fpq_analysis.intervals import Z95
from fpq_analysis.loss_titles import loss_title
from fpq_analysis.methods import bits_rank, method_rank
from fpq_analysis.text import listed

TRAINED_IN = {"noise-features": "features", "noise-weights": "weights"}
AT_CHANCE = "at chance"  # status of an accuracy no better than that of naming the most frequent class
ABOVE_GUESSING = "above guessing"  # of a cross-entropy higher than that of giving the classes' frequencies


def totals(records: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold a whole network's trace and are finite."""
    whole = records[(records["layer"] == "all") & (records["quantity"] == "trace")]
    return whole[whole["value"].notna()]


def eigenvalues(records: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold an eigenvalue, with its place in a column `rank` (1 is the extreme one)."""
    rows = records[records["quantity"].str.startswith("eigenvalue_") & records["value"].notna()]
    return rows.assign(rank=rows["quantity"].str.removeprefix("eigenvalue_").astype(int))


def variances(records: pd.DataFrame, quantity: str = "logit_variance") -> pd.DataFrame:
    """The rows of a quantity at each run's last epoch, with the noise's standard deviation in a column `sd`."""
    rows = last_epochs(records[records["quantity"].str.startswith(f"{quantity}@") & records["value"].notna()])
    return rows.assign(sd=[float(name.rpartition("@")[2]) for name in rows["quantity"]])


def nearest(rows: pd.DataFrame, sd: float) -> float:
    """Of the standard deviations of `variances` the one nearest to `sd`, in ratio."""
    return min(map(float, rows["sd"].unique()), key=lambda found: abs(math.log(found / sd)))


def norms(records: pd.DataFrame, quantity: str = "grad_norm_minibatch") -> pd.DataFrame:
    """The whole networks' rows of a gradient norm, with what the noise is in (`clean`: none) in a column `arm`."""
    rows = records[(records["layer"] == "all") & records["quantity"].str.startswith(f"{quantity}@")]
    rows = rows[rows["value"].notna()]
    return rows.assign(arm=[name.rpartition("@")[2] for name in rows["quantity"]])


def trained_in_noise(rows: pd.DataFrame) -> pd.DataFrame:
    """Of `norms`, where runs were trained in noise, the rows of the noise they were trained in."""
    return rows[rows["method"].map(TRAINED_IN) == rows["arm"]]


def responses(records: pd.DataFrame) -> pd.DataFrame:
    """Whole-network increases of the loss at each run's last measured epoch, with columns `kind` and `size`."""
    rows = records[(records["layer"] == "all") & records["value"].notna()]
    found = rows["quantity"].astype(str).str.extract(r"^(real|surrogate|linear|predicted)_([\d.]+(?:e[+-]?\d+)?)$")
    return last_epochs(rows.assign(kind=found[0], size=found[1].astype(float)).dropna(subset=["kind"]))


def marked(records: pd.DataFrame) -> pd.DataFrame:
    """The rows whose status is not `ok`; that a network guesses before training is as it should be."""
    guessing = records["status"].isin([AT_CHANCE, ABOVE_GUESSING])
    return records[(records["status"] != "ok") & (~guessing | (records["epoch"] > 0))]


def half_widths(rows: pd.DataFrame) -> pd.Series:
    """Half of the 95 % interval that each row states, or else 1.96 times its standard error; 0 where it has none."""
    return rows["ci95"].fillna(Z95 * rows["sem_data"]).fillna(Z95 * rows["sem"]).fillna(0.0)


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """In the one order of figures and tables: method, bits, run, epoch; what these leave equal stays as it was."""
    kinds = {(str(method), str(bits)) for method, bits in zip(rows["method"], rows["bits"], strict=True)}
    places = {kind: i for i, kind in enumerate(sorted(kinds, key=lambda k: (method_rank(k[0]), k[0], bits_rank(k[1]))))}
    place = [places[str(method), str(bits)] for method, bits in zip(rows["method"], rows["bits"], strict=True)]
    return rows.assign(_place=place).sort_values(["_place", "run", "epoch"], kind="stable").drop(columns="_place")


def last_epochs(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every run, the rows of its last epoch."""
    return rows[rows["epoch"] == rows.groupby("run")["epoch"].transform("max")]


def mean_loss(rows: pd.DataFrame) -> str:
    """What the rows' loss is called, `mean cross-entropy`; of several losses all, with `or` before the last."""
    return f"mean {listed((loss_title(name) for name in sorted(rows['loss'].unique())), 'or')}"


def interval_over(rows: pd.DataFrame) -> str:
    """What a run's own intervals in these rows are over: the data where that error is known, otherwise the probes."""
    unknown = rows["sem_data"].isna()
    if unknown.all():
        return "the random probes, for these samples"
    return "the samples, or, where single ones are not seen, the random probes" if unknown.any() else "the samples"


def samples_of(rows: pd.DataFrame) -> str:
    """What the rows were measured on: `training images` of a known data set, `samples` of what a user handed over."""
    return "training images" if set(rows["dataset"]) <= {*DATASETS} else "samples"


def distinct(rows: pd.DataFrame, column: str) -> str:
    """The different values of a column, sorted, with commas between: for captions."""
    return ", ".join(str(value) for value in sorted(rows[column].unique()))
