"""Loss increase under noise in the features, against the prediction of FPQ's Eq. 7."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.style import colour, panels, powers_of_ten, style
from fpq_analysis.records.queries import distinct, mean_loss, responses, samples_of
from fpq_analysis.text import fraction

# Kind of number: its name in the legend, its marker, filled or not, and where beside its size it stands.
KINDS = {"real": ("real network", "o", True, 1.05), "surrogate": ("straight-through", "s", False, 0.95)}
OWN = 1.0  # the size of FPQ's noise


@style()
def noise_figure(records: pd.DataFrame) -> Figure:
    """Increase of the loss against the size of the noise on logarithmic axes, a panel a run, at its last epoch.

    The line is the prediction to second order, of slope two, dotted the loss at linearised logits; points are measured,
    with the 95 % interval over the samples.  A point at or below zero, which the axis does not hold, is a triangle at
    the upper end of its interval.

    From records of the probe `noise`; raises `NothingToDraw` if they hold none.
    """
    rows = responses(records)
    if rows.empty:
        raise NothingToDraw("no loss increase under noise among the records")
    methods = sorted(rows["method"].unique())
    figure, parts = panels(rows.assign(estimator=""), (3.2, 2.8), shared=True)
    for axes, panel in parts:
        _draw(axes, panel, colour(panel["method"].iloc[0], methods))
        axes.legend(loc="upper left", handlelength=1.6)
    return figure


def _draw(axes: Axes, panel: pd.DataFrame, color: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    powers_of_ten(axes.yaxis)
    lines = {kind: panel[panel["kind"] == kind].sort_values("size") for kind in ("predicted", "linear")}
    predicted = lines["predicted"]
    above = predicted[predicted["value"] > 0]
    axes.plot(above["size"], above["value"], color="0.25", label="predicted (Eq. 7)")
    if len(lines["linear"]):
        axes.plot(lines["linear"]["size"], lines["linear"]["value"], ":", color="0.25", label="linearised logits")
    for kind, (text, marker, filled, shift) in KINDS.items():
        points = panel[panel["kind"] == kind].sort_values("size")
        up = points[points["value"] > 0]
        shade = color if filled else "0.45"
        axes.errorbar(
            up["size"] * shift,
            up["value"],
            # A bar that reaches below zero goes down to the axis.
            yerr=[np.minimum(up["ci95"], 0.999 * up["value"]), up["ci95"]],
            fmt=marker,
            color=shade,
            markerfacecolor=shade if filled else "white",
            markersize=4,
            elinewidth=0.9,
            label=text,
        )
        down = points[(points["value"] <= 0) & (points["value"] + points["ci95"] > 0)]
        if len(down):
            fill = shade if filled else "white"
            ends = down["value"] + down["ci95"]
            axes.plot(down["size"] * shift, ends, "v", color=shade, markerfacecolor=fill, markersize=4)
    values = panel.loc[panel["value"] > 0, "value"]
    if len(values):
        axes.set_ylim(values.min() / 3, values.max() * 30)  # room for the legend
    axes.axvline(OWN, color="0.7", linewidth=0.8, zorder=0)
    axes.annotate("FPQ's", (OWN, 0.02), xycoords=("data", "axes fraction"), xytext=(5, 0), textcoords="offset points",
                  fontsize=7, color="0.4")  # fmt: skip
    axes.xaxis.set_major_locator(FixedLocator(sorted(panel["size"].unique())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: fraction(size)))
    axes.set_xlabel("Width of the noise, in steps")
    axes.set_ylabel("Increase of the loss")


def noise_caption(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    rows = responses(records)
    several = partial(distinct, rows)
    how = ", ".join(sorted(rows.loc[rows["kind"] == "predicted", "estimator"].unique()))
    return (
        f"Increase of the {mean_loss(rows)} when uniform noise, of the width given in quantization steps, is added at "
        "the input of every convolution, behind its quantizer. Line: prediction to second order from the trace of the "
        f"Hessian in feature space ({how}); dotted: loss at logits linear in the noise; squares: quantizers "
        "straight-through, rounding residues fixed; circles: the network itself. Bars: 95 % interval over the samples, "
        "not over training runs; triangle: upper end of an interval about a value that is not above zero. BatchNorm in "
        f"eval mode, {several('n_data')} {samples_of(rows)} without augmentation (seed {several('seed')}: the same "
        f"samples and noise in every panel), epoch {several('epoch')}; data: {several('dataset')}; network: "
        f"{several('model')}; training seed {several('train_seed')}."
    )
