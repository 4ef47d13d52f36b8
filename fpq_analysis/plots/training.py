"""Test accuracy against the epoch, from the rows that training leaves (`train.jsonl`)."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fpq_analysis.plots.style import LINES, MARKERS, colour, label, style


def training_figure(rows: pd.DataFrame) -> Figure:
    """Test accuracy in % against the epoch, a panel for each network and data set, a line for each run.

    Where a panel has quantized runs, the float ones are horizontal lines at their last accuracy.

    Args:
        rows: a row for each run and epoch; columns run, method, model, dataset, bits, epoch, test_accuracy (0 to 1).

    Raises:
        ValueError: if there is nothing to draw.
    """
    rows = rows[rows["test_accuracy"].notna()]
    if rows.empty:
        raise ValueError("no test accuracy among the rows")
    panels = list(rows.groupby(["model", "dataset"], sort=True))
    with style():
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
    for run, line in panel.groupby("run", sort=True):
        line = line.sort_values("epoch")
        method, bits = str(line["method"].iloc[0]), str(line["bits"].iloc[0])
        alike = panel[(panel["method"] == method) & (panel["bits"] == bits)]
        text = label(method, bits) + (f" ({run})" if alike["run"].nunique() > 1 else "")
        tint, accuracy = colour(method, methods), 100 * line["test_accuracy"]
        if quantized and bits == "FP":
            text = f"{text}, epoch {line['epoch'].iloc[-1]}"
            drawn = axes.axhline(accuracy.iloc[-1], color=tint, linewidth=1.2, label=text)
        else:
            marker = MARKERS.get(bits, "o")
            (drawn,) = axes.plot(
                line["epoch"], accuracy, linestyle=LINES.get(bits, "-"), marker=marker, color=tint, label=text
            )
        ends.append((accuracy.iloc[-1], drawn))
    axes.set_xlabel("Epoch (0: before training)")
    axes.set_ylabel("Test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # The legend in the order of the lines' right ends, as in Figure 5.
    handles = [line for _, line in sorted(ends, key=lambda end: -end[0])]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))


def training_caption(rows: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    rows = rows[rows["test_accuracy"].notna()]
    several = {column: ", ".join(sorted(map(str, rows[column].unique()))) for column in ("model", "dataset")}
    return (
        f"Test accuracy against the epoch, on the whole test set. Data: {several['dataset']}; network: "
        f"{several['model']}. Each line is one training run."
    )
