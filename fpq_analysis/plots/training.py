"""Test accuracy against the epoch, from the rows that training leaves (`train.jsonl`)."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import draw_curve, draw_level, epoch_axis, head, legend, panels, subjects, value_axis
from fpq_analysis.plots.names import LABELS, Looks, at_epoch, titles
from fpq_analysis.plots.style import style
from fpq_analysis.records.comparison import MIN_SEEDS
from fpq_analysis.records.queries import ordered
from fpq_analysis.records.seeds import Curve, curve

VARIANT = ["model", "dataset", "method", "variant", "bits"]  # what runs drawn as one line have in common
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
    looks = Looks(line for _, line in ordered(rows).groupby(VARIANT, sort=False))
    artists = [artist for axes, panel in zip(places, found, strict=True) for artist in _draw(axes, *panel, looks)]
    legend(figure, artists)
    return figure


def _draw(axes: Axes, title: str, panel: pd.DataFrame, widths: set[str], looks: Looks) -> list[Any]:
    quantized = bool((panel["bits"] != "FP").any())
    named = variants(panel.assign(value=100 * panel["test_accuracy"]))
    lines = [one for _, one in named]
    levels = [quantized and one.first["bits"] == "FP" for one in lines]
    shown = [one.last() if level else one for level, one in zip(levels, lines, strict=True)]
    value_axis(axes, shown, wide=math.inf, zero=False)
    artists = []
    for level, (text, one) in zip(levels, named, strict=True):
        if level:
            artists.append(draw_level(axes, one, looks, at_epoch(text, one.x[-1])))
        elif one.first["bits"] in widths:
            artists.append(draw_curve(axes, one, looks.line(one.first), text))
    epoch_axis(axes)
    axes.set_ylabel("Test accuracy (%)")
    head(axes, title)
    return artists


def variants(rows: pd.DataFrame) -> list[tuple[str, Curve]]:
    """The mean of the column `value` for each variant and bits, and what legends call it, in the one order."""
    found = []
    for _, line in ordered(rows.assign(**NO_ERROR)).groupby(VARIANT, sort=False):
        variant, bits = (str(line[column].iloc[0]) for column in ("variant", "bits"))
        variant = LABELS.get().get(variant, variant)
        found.append((variant if bits == "FP" else f"{variant} {bits}", curve(line)))
    return found


def seeds_words(rows: pd.DataFrame) -> str:
    """What lines and bands are, as a sentence for a caption."""
    seeds = rows.groupby(["model", "dataset", "variant", "bits"])["run"].nunique().max()
    if seeds == 1:
        return "Each line is one training run."
    bands = f"; bands: 95 % Student interval over the runs, from {MIN_SEEDS} on" if seeds >= MIN_SEEDS else ""
    return f"Thick lines: mean over up to {seeds} training runs; thin ones: each of them{bands}."


def training_caption(rows: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    return (
        f"Test accuracy against the epoch, on the whole test set. {seeds_words(rows)} Data: "
        f"{titles(rows, 'dataset')}; network: {titles(rows, 'model')}."
    )
