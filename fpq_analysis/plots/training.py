"""Test accuracy against the epoch, from the rows that training leaves (`train.jsonl`)."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import draw_curve, draw_level, epoch_axis, head, legend, panels, subjects, value_axis
from fpq_analysis.plots.names import LABELS, at_epoch, colour, line_style, titles
from fpq_analysis.plots.style import style
from fpq_analysis.records.comparison import MIN_SEEDS
from fpq_analysis.records.queries import ordered
from fpq_analysis.records.seeds import curve

NO_ERROR = {"ci95": None, "sem": None, "sem_data": None, "samples": None, "n_data": 0}  # of the whole test set


@style()
def training_figure(rows: pd.DataFrame) -> Figure:
    """Test accuracy in % against the epoch, a panel for each network and data set, a line for each variant and bits.

    The line is the mean over its runs, the training seeds; from three on with a 95 % Student interval over them.
    Where a panel has quantized runs, the float ones are a horizontal line at their last accuracy.

    Args:
        rows: a row for each run and epoch; columns run, variant (the method, as the legend calls it), method, model,
            dataset, bits, epoch, test_accuracy (0 to 1).

    Raises:
        NothingToDraw: if there is nothing to draw.
    """
    if rows.empty:
        raise NothingToDraw("no test accuracy among the rows")
    found = subjects(rows)
    figure, places = panels(len(found), 2.4, across=(1, 2))
    artists = [artist for axes, panel in zip(places, found, strict=True) for artist in _draw(axes, *panel)]
    legend(figure, artists)
    return figure


def _draw(axes: Axes, title: str, panel: pd.DataFrame, widths: set[str]) -> list[Any]:
    methods = sorted(panel["method"].unique())
    quantized = bool((panel["bits"] != "FP").any())
    panel = ordered(panel.assign(value=100 * panel["test_accuracy"], **NO_ERROR))
    lines = [curve(line) for _, line in panel.groupby(["method", "variant", "bits"], sort=False)]
    levels = [quantized and one.first["bits"] == "FP" for one in lines]
    shown = [one.last() if level else one for level, one in zip(levels, lines, strict=True)]
    value_axis(axes, shown, wide=math.inf, zero=False)
    artists = []
    for level, one in zip(levels, lines, strict=True):
        method, variant, bits = (str(one.first[column]) for column in ("method", "variant", "bits"))
        if bits not in widths:
            continue
        variant = LABELS.get().get(variant, variant)
        if level:
            artists.append(draw_level(axes, one, colour(method, methods), at_epoch(variant, one.x[-1])))
        else:
            text = variant if bits == "FP" else f"{variant} {bits}"
            artists.append(draw_curve(axes, one, line_style(method, bits, methods), text))
    epoch_axis(axes)
    axes.set_ylabel("Test accuracy (%)")
    head(axes, title)
    return artists


def training_caption(rows: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    seeds = rows.groupby(["model", "dataset", "variant", "bits"])["run"].nunique().max()
    runs = "each line is one training run"
    if seeds > 1:
        runs = f"thick lines: mean over up to {seeds} training runs; thin ones: each of them"
    if seeds >= MIN_SEEDS:
        runs += f"; bands: 95 % Student interval over the runs, from {MIN_SEEDS} on"
    return (
        f"Test accuracy against the epoch, on the whole test set; {runs}. Data: "
        f"{titles(rows, 'dataset')}; network: {titles(rows, 'model')}."
    )
