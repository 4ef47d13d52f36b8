"""Test accuracy against the epoch, from the rows that training leaves (`train.jsonl`)."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.style import colour, epoch_axis, legend_by_ends, line_style, style
from fpq_analysis.records.queries import distinct


@style()
def training_figure(rows: pd.DataFrame) -> Figure:
    """Test accuracy in % against the epoch, a panel for each network and data set, a line for each variant and bits.

    The line is the mean over its runs, the training seeds; the band reaches from the lowest to the highest of them.
    Where a panel has quantized runs, the float ones are a horizontal line at their last accuracy.

    Args:
        rows: a row for each run and epoch; columns run, variant (the method, as the legend calls it), method, model,
            dataset, bits, epoch, test_accuracy (0 to 1).

    Raises:
        NothingToDraw: if there is nothing to draw.
    """
    if rows.empty:
        raise NothingToDraw("no test accuracy among the rows")
    panels = list(rows.groupby(["model", "dataset"], sort=True))
    figure = Figure(figsize=(5.2 * len(panels), 3.0), layout="constrained")
    for index, ((model, dataset), panel) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _draw_panel(axes, panel)
        axes.set_title(f"{model}, {dataset}")
    return figure


def _draw_panel(axes: Axes, panel: pd.DataFrame) -> None:
    methods = sorted(panel["method"].unique())
    quantized = bool((panel["bits"] != "FP").any())
    ends = []
    for _, line in panel.groupby(["variant", "bits"], sort=True):
        method, variant, bits = (str(line[column].iloc[0]) for column in ("method", "variant", "bits"))
        color = colour(method, methods)
        accuracy = 100 * line.groupby("epoch")["test_accuracy"].agg(["mean", "min", "max"])
        last = accuracy.iloc[-1]
        if quantized and bits == "FP":
            drawn = axes.axhline(
                last["mean"], color=color, linewidth=1.2, label=f"{variant}, epoch {accuracy.index[-1]}"
            )
            axes.axhspan(last["min"], last["max"], color=color, alpha=0.12, linewidth=0)
        else:
            text = variant if bits == "FP" else f"{variant} {bits}"
            (drawn,) = axes.plot(accuracy.index, accuracy["mean"], label=text, **line_style(method, bits, methods))
            axes.fill_between(accuracy.index, accuracy["min"], accuracy["max"], color=color, alpha=0.15, linewidth=0)
        ends.append((last["mean"], drawn))
    epoch_axis(axes)
    axes.set_ylabel("Test accuracy (%)")
    legend_by_ends(axes, ends)


def training_caption(rows: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    seeds = rows.groupby(["model", "dataset", "variant", "bits"])["run"].nunique()
    runs = "each line is one training run"
    if seeds.max() > 1:
        runs = f"mean over up to {seeds.max()} training runs, bands from the lowest to the highest of them"
    return (
        f"Test accuracy against the epoch, on the whole test set; {runs}. Data: "
        f"{distinct(rows, 'dataset')}; network: {distinct(rows, 'model')}."
    )
