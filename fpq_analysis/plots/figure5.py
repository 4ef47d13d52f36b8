"""Figure 5 of the paper: the trace of the Hessian against the epoch, a line for each method and bit width."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import (
    draw_curve,
    draw_level,
    epoch_axis,
    head,
    kinds,
    legend,
    panels,
    subjects,
    value_axis,
)
from fpq_analysis.plots.names import Looks, at_epoch, titles
from fpq_analysis.plots.style import style
from fpq_analysis.records.queries import distinct, interval_over, mean_loss, samples_of, totals
from fpq_analysis.records.seeds import curve, families, interval_words

# Where one run is measured in several definitions, these tell its lines apart, and not the bit width.
LINES = {"dequantized": "-", "latent": "--", "float": ":"}


@style()
def figure5(records: pd.DataFrame) -> Figure:
    """Trace against epoch, a panel for each network and data set, of many lines also for each bit width.

    A line for the runs that differ by their seed alone; its band is the 95 % interval, see `records.seeds.Curve`.
    Where a panel has quantized runs, the float ones they may have started from are a horizontal line at their last
    epoch's trace.  All lines of a panel see the same samples, so that the difference of two lines is surer than their
    bands suggest.  The axis is logarithmic where the traces span more than a factor of ten.

    From records of the probe `hessian_trace`; raises `NothingToDraw` if they hold none.
    """
    rows = totals(records)
    if rows.empty:
        raise NothingToDraw("no finite trace among the records")
    found = subjects(rows)
    figure, places = panels(len(found), 2.4, across=(1, 2))
    looks = Looks(families(rows))
    artists = [artist for axes, panel in zip(places, found, strict=True) for artist in _draw(axes, *panel, looks)]
    legend(figure, artists)
    return figure


def _draw(axes: Axes, title: str, panel: pd.DataFrame, widths: set[str], looks: Looks) -> list[Any]:
    quantized = bool((panel["bits"] != "FP").any())
    found = [(text, curve(line)) for text, line in kinds(panel)]
    levels = [quantized and one.first["bits"] == "FP" for _, one in found]
    value_axis(axes, [one.last() if level else one for level, (_, one) in zip(levels, found, strict=True)])
    # Runs measured at one epoch each stand side by side there, so that their bars are told apart.
    apart = 0.05 if max(len(one.x) for _, one in found) == 1 else 0.0
    artists = []
    for place, (text, one) in enumerate(found):
        if one.first["bits"] not in widths:
            continue
        if levels[place]:
            artists.append(draw_level(axes, one, looks, at_epoch(text, one.x[-1])))
        else:
            shift = apart * (place - (len(found) - 1) / 2)
            look = looks.line(one.first)
            if panel["definition"].nunique() > 1:
                look["linestyle"] = LINES.get(one.first["definition"], "-")
            artists.append(draw_curve(axes, one, look, text, shift=shift))
    epoch_axis(axes)
    axes.set_ylabel("Trace of the Hessian")
    head(axes, title)
    return artists


def caption5(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure: definition, method, data, seeds, sample size."""
    rows = totals(records)
    several = partial(distinct, rows)
    return (
        f"Trace of the Hessian of the {mean_loss(rows)} against the epoch (definition: {several('definition')}; "
        f"estimator: {several('estimator')}), BatchNorm in eval mode, on {several('n_data')} {samples_of(rows)} "
        f"without augmentation (sample seed {several('seed')}; the same samples for every line). Data: "
        f"{titles(rows, 'dataset')}; network: {titles(rows, 'model')}; training seed {several('train_seed')}. "
        + interval_words(rows, interval_over(rows))
    )
