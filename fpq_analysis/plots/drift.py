"""Drift of the features from the float network's: against the epoch, and layer by layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import draw_curve, epoch_axis, head, legend, panels, subjects, value_axis
from fpq_analysis.plots.names import Looks, family_label, titles
from fpq_analysis.plots.style import COLUMNS, style
from fpq_analysis.records.queries import distinct, last_epochs, samples_of
from fpq_analysis.records.seeds import curve, families, interval_words

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
    """The network's drift against the epoch, a panel a quantity; a row for each network and data set.

    A line for the runs that differ by their seed alone; bands: see `records.seeds.Curve`.  Axes are logarithmic
    where the values span more than a factor of ten.

    From records of the probe `drift`; raises `NothingToDraw` if they hold none.
    """
    rows = drift_rows(records)
    return _figure(rows[rows["layer"] == "all"], "epoch")


def drift_layer_figure(records: pd.DataFrame) -> Figure:
    """The drift of every layer at each run's last epoch, in the order of the network; else as `drift_figure`."""
    rows = drift_rows(records)
    rows = last_epochs(rows[rows["layer"] != "all"])
    return _figure(rows, "place")


@style()
def _figure(rows: pd.DataFrame, along: str) -> Figure:
    if rows.empty:
        raise NothingToDraw("no drift among the records")
    found = subjects(rows)
    # Names of layers need height.
    height = 2.0 if along == "epoch" else 2.4
    figure, places = panels(len(QUANTITIES) * len(found), height)
    artists = []
    for i, (title, part, widths) in enumerate(found):
        for axes, (quantity, text) in zip(places[len(QUANTITIES) * i :], QUANTITIES.items(), strict=False):
            artists += _draw(axes, part[part["quantity"] == quantity], along, widths)
            axes.set_ylabel(text)
            head(axes, title)
    legend(figure, artists)
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, along: str, widths: set[str]) -> list[Any]:
    looks = Looks(families(rows))
    names = list(dict.fromkeys(rows["layer"]))
    rows = rows.assign(place=rows["layer"].map(names.index) + 1)
    found = [(family_label(one, rows), curve(one, along)) for one in families(rows)]
    value_axis(axes, [one for _, one in found])
    artists = []
    for text, one in found:
        if one.first["bits"] not in widths:
            continue
        mark = looks.line(one.first)
        artists.append(draw_curve(axes, one, mark, text, along))
    if along == "epoch":
        epoch_axis(axes)
    else:
        axes.set_xlabel("Convolution")
        step = -(-len(names) // (28 if COLUMNS.get() == 1 else 18))
        axes.set_xticks(range(1, len(names) + 1, step))
        axes.set_xticklabels([_short(name) for name in names[::step]], rotation=90, fontsize=6)
        axes.grid(axis="x", visible=False)
    return artists


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
        f"Data: {titles(rows, 'dataset')}; network: {titles(rows, 'model')}; training seed {several('train_seed')}. "
        + interval_words(rows, "the samples (jackknife over blocks of them)")
    )
