"""Drift of the features from the float network's: against the epoch, and layer by layer."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.style import band, epoch_axis, line_style, log_if_wide, run_label, style
from fpq_analysis.records.queries import distinct, last_epochs, samples_of

# Quantity to the label of its axis.
QUANTITIES = {
    "mean_shift": "Mean shift (sd)",
    "decorrelation": "1 − correlation",
    "wasserstein": "Wasserstein-1 (sd)",
}


def drift_rows(records: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold one of the quantities and are finite."""
    return records[records["quantity"].isin(list(QUANTITIES)) & records["value"].notna()]


def drift_figure(records: pd.DataFrame) -> Figure:
    """The network's drift against the epoch, a panel a quantity, a line a run, a row for each network and data set.

    Bands are 95 % intervals over the samples.  Axes are logarithmic where the values span more than a factor of ten.

    From records of the probe `drift`; raises `NothingToDraw` if they hold none.
    """
    rows = drift_rows(records)
    return _figure(rows[rows["layer"] == "all"], "epoch")


def drift_layer_figure(records: pd.DataFrame) -> Figure:
    """The drift of every layer at each run's last epoch, in the order of the network; else as `drift_figure`."""
    rows = drift_rows(records)
    rows = last_epochs(rows[rows["layer"] != "all"])
    return _figure(rows, "layer")


@style()
def _figure(rows: pd.DataFrame, along: str) -> Figure:
    if rows.empty:
        raise NothingToDraw("no drift among the records")
    bands = list(rows.groupby(["model", "dataset"], sort=True))
    # Names of layers need height.
    height = 2.5 if along == "epoch" else 3.1
    figure = Figure(figsize=(2.6 * len(QUANTITIES) + 1.1, height * len(bands)), layout="constrained")
    for down, ((model, dataset), part) in enumerate(bands):
        for place, (quantity, text) in enumerate(QUANTITIES.items()):
            axes = figure.add_subplot(len(bands), len(QUANTITIES), down * len(QUANTITIES) + place + 1)
            _draw(axes, part[part["quantity"] == quantity], along)
            axes.set_ylabel(text)
            if place == 1:
                axes.set_title(f"{model}, {dataset}")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, along: str) -> None:
    methods = sorted(rows["method"].unique())
    lines = []
    for _, line in rows.groupby("run", sort=False):
        last = line[line["epoch"] == line["epoch"].max()]["value"].mean()
        lines.append((last, line))
    for _, line in sorted(lines, key=lambda one: -one[0]):  # the legend in the order of the lines
        first = line.iloc[0]
        mark = line_style(first["method"], first["bits"], methods)
        if along == "epoch":
            line = line.sort_values("epoch")
        x = line["epoch"].to_numpy() if along == "epoch" else np.arange(1, len(line) + 1)
        axes.plot(x, line["value"], label=run_label(first, rows), **mark)
        band(axes, x, line["value"], line["ci95"], mark["color"])
    if along == "epoch":
        epoch_axis(axes, 5)
    else:
        names = list(dict.fromkeys(rows["layer"]))
        axes.set_xlabel("Convolution")
        step = max(1, -(-len(names) // 24))
        axes.set_xticks(range(1, len(names) + 1, step))
        axes.set_xticklabels([_short(name) for name in names[::step]], rotation=90, fontsize=6)
        axes.grid(axis="x", visible=False)
    if not log_if_wide(axes, rows["value"].min(), rows["value"].max()):
        axes.set_ylim(bottom=0)


def _short(name: str) -> str:
    """A layer's name without the stem that all blocks share."""
    return name.removeprefix("stages.").removeprefix("features.")


def drift_caption(records: pd.DataFrame) -> str:
    """What a reader must know beside the figures: definitions, data, seeds, what the band is."""
    rows = drift_rows(records)
    several = partial(distinct, rows)
    part = rows[(rows["quantity"] == "wasserstein") & (rows["estimator"] != "all values")]
    how = f" (from {', '.join(sorted(part['estimator'].unique()))})" if len(part) else ""
    return (
        "Drift of the raw outputs of all convolutions from those of the float network the run started from: size of "
        "the shift of a channel's mean, 1 - correlation, and Wasserstein-1 distance of the distributions"
        f"{how}; shift and distance in standard deviations of the float network's channel; means over the channels "
        "of a layer, and of the network over its convolutions. BatchNorm in eval mode, "
        f"{several('n_data')} {samples_of(records)} without augmentation (seed {several('seed')}; the "
        "same for every run). "
        f"Data: {several('dataset')}; network: {several('model')}; training seed {several('train_seed')}. Bands: 95 % "
        "interval over the samples (jackknife over blocks of them), not over training runs."
    )
