"""Figure 1 of the paper: how much the prediction varies under noise in the input."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import GLYPH, draw_curve, head, legend, panels, room, value_axis
from fpq_analysis.plots.names import HATCHES, Looks, family_label, family_title, subject, titles
from fpq_analysis.plots.style import style
from fpq_analysis.records.queries import distinct, nearest, samples_of, variances
from fpq_analysis.records.seeds import curve, families, interval_words

SD = 0.1  # of the bars, where it was measured
WHAT = {"logit_variance": "logits", "probability_variance": "class probabilities"}


@style()
def figure1(records: pd.DataFrame, *, quantity: str = "logit_variance", sd: float = SD) -> Figure:
    """Variance of the output at each run's last epoch: bars at one size of noise, beside all sizes on logarithmic axes.

    Two panels for each network and data set; a bar and a line for the runs that differ by their seed alone: their mean
    with its 95 % interval (see `records.seeds.Curve`), each of several as a point.  All see the same samples with the
    same noise, so that a difference is surer than the intervals suggest.

    Args:
        records: of the probe `output_variance`; columns as in `records.COLUMNS`.
        quantity: `logit_variance` or `probability_variance`.
        sd: of the bars; the nearest that was measured.

    Raises:
        NothingToDraw: if there is nothing to draw.
    """
    rows = variances(records, quantity)
    if rows.empty:
        raise NothingToDraw(f"no finite {quantity} among the records")
    subjects = [panel for _, panel in rows.groupby(["model", "dataset"], sort=True)]
    figure, places = panels(2 * len(subjects), 2.3, across=(1, 2))
    artists = []
    for i, panel in enumerate(subjects):
        bars, sweep = places[2 * i : 2 * i + 2]
        looks = Looks(families(panel))
        at, about = nearest(panel, sd), subject(panel.iloc[0])
        _draw_bars(bars, panel[panel["sd"] == at], looks)
        artists += _draw_sweep(sweep, panel, looks)
        for axes, text in ((bars, f"noise of sd {at:g}"), (sweep, "all sizes of noise")):
            axes.set_ylabel(f"Variance of the {WHAT[quantity]}")
            head(axes, f"{about}\n{text}")
    legend(figure, artists)
    return figure


def _draw_bars(axes: Axes, panel: pd.DataFrame, looks: Looks) -> None:
    """Bars of a method side by side, told apart by their hatching; below them its name, or without room its marker."""
    groups = list(families(panel))
    names = [family_title(family, panel) for family in groups]
    found = [curve(family, "sd") for family in groups]
    value_axis(axes, found, wide=np.inf)
    halo = [withStroke(linewidth=2, foreground="white")]  # for black bars
    middles: dict[str, list[float]] = {}
    place = 0.0
    for name, one in zip(names, found, strict=True):
        bits = str(one.first["bits"])
        place += 1.0 if name in middles else 1.5
        middles.setdefault(name, []).append(place)
        (value,), (low,), (high,) = one.value, one.low, one.high
        floor, ceiling = axes.get_ylim()
        errors = [[value - max(low, floor)], [min(high, ceiling) - value]]
        axes.bar(place, value, 0.9, color=looks.colour(one.first), hatch=HATCHES.get(bits, "\\\\\\"), linewidth=0)
        axes.errorbar(place, value, errors, color="0.15", capsize=2, linewidth=0.9, fmt="none", path_effects=halo)
        if len(one.runs) > 1:
            each = [float(run["value"].iloc[0]) for run in one.runs]
            spots = place + 0.25 * np.linspace(-1, 1, len(each))
            axes.plot(spots, each, "o", color="0.15", markersize=2.2, markerfacecolor="white", markeredgewidth=0.6)
    under = {name: float(np.mean(where)) for name, where in middles.items()}
    inch = 1.1 * (place - 0.5) / room(axes)  # of the axis
    fit = all(
        (len(one) + len(other)) / 2 * GLYPH * inch < under[other] - under[one]
        for one, other in itertools.pairwise(under)
    )
    axes.set_xticks(list(under.values()), list(under) if fit else [""] * len(under))
    if len(middles) > 5:
        axes.tick_params(axis="x", labelsize=6)
    if not fit:  # then the marker that the run has in the legend
        for at, one in zip(itertools.chain(*middles.values()), found, strict=True):
            mark = looks.line(one.first) | {"linestyle": "", "markersize": 5, "label": "_"}
            axes.plot(at, -0.07, **mark, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.grid(False, axis="x")
    widths = list(dict.fromkeys(str(one.first["bits"]) for one in found if one.first["bits"] != "FP"))
    if widths:
        axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
        key = [Patch(facecolor="0.55", hatch=HATCHES.get(bits, "\\\\\\"), linewidth=0, label=bits) for bits in widths]
        axes.legend(handles=key, loc="upper right", ncols=len(key), handlelength=1.6, columnspacing=1.2)


def _draw_sweep(axes: Axes, panel: pd.DataFrame, looks: Looks) -> list[Any]:
    found = [(family_label(family, panel), curve(family, "sd")) for family in families(panel)]
    sds = sorted(map(float, panel["sd"].unique()))
    axes.set_xscale("log")
    value_axis(axes, [one for _, one in found], wide=1.0)
    artists = []
    for text, one in found:
        mark = looks.line(one.first)
        artists.append(draw_curve(axes, one, mark, text, "sd"))
    least = min(one.value[0] for _, one in found)
    if least > 0 and len(sds) > 1:
        guide = [0.5 * least * (x / sds[0]) ** 2 for x in sds]
        artists += axes.plot(sds, guide, ":", color="0.5", linewidth=1.0, label="∝ sd²")
        axes.set_ylim(bottom=min(axes.get_ylim()[0], 0.8 * guide[0]))
    axes.xaxis.set_major_locator(FixedLocator(sds))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("Sd of the noise in the input")
    return artists


def caption1(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure: what varies, under noise, data, seeds, what the intervals are."""
    rows = variances(records)
    several = partial(distinct, rows)
    return (
        "Variance of the logits under Gaussian noise in the input, unbiased over the draws, mean over classes and "
        "samples, at each run's last epoch. The noise's standard deviation is in units of the normalised input; "
        f"{several('n_data')} {samples_of(rows)} without augmentation (seed {several('seed')}; the same samples and "
        f"noise for every run), quantized activations really rounded. Data: {titles(rows, 'dataset')}; network: "
        f"{titles(rows, 'model')}; training seed {several('train_seed')}; epoch {several('epoch')}. "
        "Dotted: a linear response, whose variance is proportional to sd². "
        + interval_words(rows, "the samples, draws of the noise included")
    )
