"""Oscillating weights against the epoch."""

from __future__ import annotations

from functools import partial

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.style import line_style, run_label, style
from fpq_analysis.records.queries import distinct
from fpq_analysis.text import listed

PANELS = {"near": "Near a rounding threshold", "flipped": "On another level than before"}


def shares(records: pd.DataFrame) -> pd.DataFrame:
    """The whole-network shares that are drawn."""
    rows = records[(records["layer"] == "all") & records["quantity"].isin(list(PANELS))]
    return rows[rows["value"].notna()]


def comparable(records: pd.DataFrame) -> pd.DataFrame:
    """As `shares`, with the epochs since the checkpoint before in a column `span` (NaN in older records).

    The share of flips is NaN where that is another number than is usual in the run: flips across a missing checkpoint
    are those of several epochs, and no number to be seen beside the others.
    """
    before = records.loc[records["quantity"] == "previous", ["run", "epoch", "value"]]
    before = before.drop_duplicates(["run", "epoch"], keep="last").rename(columns={"value": "previous"})
    rows = shares(records).merge(before, how="left", on=["run", "epoch"])
    rows["span"] = rows["epoch"] - rows["previous"].astype(float)
    usual = rows.groupby("run")["span"].transform(lambda span: span.mode().min())
    across = (rows["quantity"] == "flipped") & rows["span"].notna() & (rows["span"] != usual)
    return rows.assign(value=rows["value"].mask(across))


@style()
def oscillation_figure(records: pd.DataFrame) -> Figure:
    """Share of the weights near a threshold, and of those that flipped, against the epoch; a line a run.

    A row of two panels for each network and data set.  The grey line is the share near a threshold if weights lay
    anywhere in their step with equal chance.  Where a checkpoint is missing, the line of flips is broken.

    From records of the probe `oscillation`; raises `NothingToDraw` if they hold none.
    """
    rows = comparable(records)
    if rows.empty:
        raise NothingToDraw("no oscillation among the records")
    eps = float(records.loc[records["quantity"] == "eps", "value"].iloc[-1])
    subjects = list(rows.groupby(["model", "dataset"], sort=True))
    figure = Figure(figsize=(7.6, 2.9 * len(subjects)), layout="constrained")
    for index, ((model, dataset), subject) in enumerate(subjects):
        methods = sorted(subject["method"].unique())
        for place, (quantity, title) in enumerate(PANELS.items()):
            axes = figure.add_subplot(len(subjects), 2, 2 * index + place + 1)
            for _, line in subject[subject["quantity"] == quantity].groupby("run", sort=True):
                line = line.sort_values("epoch")
                first = line.iloc[0]
                mark = line_style(first["method"], first["bits"], methods)
                axes.plot(line["epoch"], line["value"], label=run_label(first, subject), **mark)
            if quantity == "near":
                axes.axhline(2 * eps, color="0.6", linewidth=0.8, label="if spread evenly")
            axes.set_ylim(bottom=0)
            axes.set_title(title if len(subjects) == 1 else f"{title}: {model}, {dataset}")
            axes.set_xlabel("Epoch")
            axes.set_ylabel("Share of the weights")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        handles = figure.axes[2 * index].get_legend_handles_labels()
        axes.legend(*handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def oscillation_caption(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    rows = comparable(records)
    eps = float(records.loc[records["quantity"] == "eps", "value"].iloc[-1])
    several = partial(distinct, rows)
    flips = rows[rows["quantity"] == "flipped"]
    spans = sorted(set(flips.loc[flips["value"].notna(), "span"].dropna().astype(int)))
    before = f", {listed(spans, 'or')} epochs earlier" if spans and spans != [1] else ""
    broken = " Lines are broken where a checkpoint is missing." if flips["value"].isna().any() else ""
    return (
        f"Left: share of the quantized weights less than {eps:g} steps from a rounding threshold. Right: share whose "
        f"whole number differs from that at the checkpoint before{before}, whether the weight moved or its step size."
        f"{broken} All "
        "quantized weights are counted, so that there is no error; one training run a line. "
        f"Data: {several('dataset')}; network: {several('model')}; training seed {several('train_seed')}."
    )
