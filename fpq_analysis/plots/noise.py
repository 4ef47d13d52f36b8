"""Loss increase under noise in the features, against the prediction of FPQ's Eq. 7."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import head, kinds, legend, outer, panels, powers_of_ten
from fpq_analysis.plots.names import Looks, titles
from fpq_analysis.plots.style import style
from fpq_analysis.records.queries import distinct, mean_loss, responses, samples_of
from fpq_analysis.records.seeds import Curve, curve, families, interval_words
from fpq_analysis.text import fraction

# Kind of number: its name in the legend, its marker, filled or not, and where beside its size it stands.
KINDS = {"real": ("real network", "o", True, 1.05), "surrogate": ("straight-through", "s", False, 0.95)}
OWN = 1.0  # the size of FPQ's noise


@style()
def noise_figure(records: pd.DataFrame) -> Figure:
    """Increase of the loss against the size of the noise on logarithmic axes, at the last epoch.

    A panel for the runs that differ by their seed alone, see `records.seeds.Curve`.  The line is the prediction to
    second order, of slope two, dotted the loss at linearised logits; points are measured, with their 95 % interval.  A
    point at or below zero, which the axis does not hold, is a triangle at the upper end of its interval.

    From records of the probe `noise`; raises `NothingToDraw` if they hold none.
    """
    rows = responses(records)
    if rows.empty:
        raise NothingToDraw("no loss increase under noise among the records")
    looks = Looks(families(rows))
    found = kinds(rows, ["definition"])
    figure, places = panels(len(found), 2.0, sharex=True, sharey=True)
    values = rows.loc[rows["value"] > 0, "value"]
    for axes, (text, panel) in zip(places, found, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        powers_of_ten(axes.yaxis)
        if len(values):
            axes.set_ylim(values.min() / 3, values.max() * 3)
        _draw(axes, panel, looks.colour(panel.iloc[0]))
        head(axes, text)
    outer(places)
    artists = [artist for axes in places for artist in axes.get_legend_handles_labels()[0]]
    legend(figure, [_key(artist) for artist in artists], most=5)
    return figure


def _key(artist: Any) -> Any:
    """What stands for an artist in the legend: points have no colour there, as they have another in each panel."""
    for text, marker, filled, _ in KINDS.values():
        if artist.get_label() == text:
            face = "0.25" if filled else "white"
            return Line2D([], [], color="0.25", linestyle="", marker=marker, markerfacecolor=face, label=text)
    return artist


def _draw(axes: Axes, panel: pd.DataFrame, color: str) -> None:
    curves = {str(kind): curve(rows, "size") for kind, rows in panel.groupby("kind")}
    for kind, line, text in (("predicted", "-", "predicted (Eq. 7)"), ("linear", ":", "linearised logits")):
        if kind in curves:
            one = curves[kind]
            axes.plot(one.x, np.where(one.value > 0, one.value, np.nan), line, color="0.25", label=text)
    for kind, (text, marker, filled, shift) in KINDS.items():
        if kind in curves:
            shade = color if filled else "0.45"
            look = {"color": shade, "markerfacecolor": shade if filled else "white", "markersize": 4}
            _draw_points(axes, curves[kind], shift, marker, look, text)
    axes.axvline(OWN, color="0.7", linewidth=0.8, zorder=0)
    axes.annotate("FPQ's noise", (OWN, 0.02), xycoords=("data", "axes fraction"), xytext=(-3, 0), ha="right",
                  textcoords="offset points", fontsize=6.5, color="0.4")  # fmt: skip
    axes.xaxis.set_major_locator(FixedLocator(sorted(panel["size"].unique())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: fraction(size)))
    axes.set_xlabel("Noise, in steps")
    axes.set_ylabel("Increase of the loss")


def _draw_points(axes: Axes, one: Curve, shift: float, marker: str, look: dict[str, Any], text: str) -> None:
    """Points with their intervals, which end where the axis does, and triangles for what is not above zero."""
    floor, ceiling = axes.get_ylim()
    up = one.value > 0
    low, high = np.clip(one.low[up], floor, None), np.clip(one.high[up], None, ceiling)
    errors = [one.value[up] - low, np.maximum(high - one.value[up], 0)]
    axes.errorbar(one.x[up] * shift, one.value[up], errors, fmt=marker, elinewidth=0.9, label=text, **look)
    down = ~up & (one.high > floor)
    if down.any():
        axes.plot(one.x[down] * shift, one.high[down], "v", label="_", **look)


def noise_caption(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    rows = responses(records)
    several = partial(distinct, rows)
    how = ", ".join(sorted(rows.loc[rows["kind"] == "predicted", "estimator"].unique()))
    return (
        f"Increase of the {mean_loss(rows)} when uniform noise, of the width given in quantization steps, is added at "
        "the input of every convolution, behind its quantizer. Line: prediction to second order from the trace of the "
        f"Hessian in feature space ({how}); dotted: loss at logits linear in the noise; squares: quantizers "
        "straight-through, rounding residues fixed; circles: the network itself; triangle: upper end of an interval "
        "about a value that is not above zero. BatchNorm in "
        f"eval mode, {several('n_data')} {samples_of(rows)} without augmentation (seed {several('seed')}: the same "
        f"samples and noise in every panel), epoch {several('epoch')}; data: {titles(rows, 'dataset')}; network: "
        f"{titles(rows, 'model')}; training seed {several('train_seed')}. " + interval_words(rows)
    )
