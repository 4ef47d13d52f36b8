"""Figure 5 of the paper: the trace of the Hessian against the epoch, one line a run."""

from __future__ import annotations

from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.style import band, colour, epoch_axis, legend_by_ends, line_style, log_if_wide, run_label, style
from fpq_analysis.records.queries import distinct, mean_loss, samples_of, totals

# What the rows of one line have in common.
LINE = ["run", "method", "bits", "definition", "estimator"]


@style()
def figure5(records: pd.DataFrame) -> Figure:
    """Trace against epoch, a panel for each network and data set, a line for each run.

    Where a panel has quantized runs, the float run they may have started from is a horizontal line at its last epoch's
    trace.  The band is the 95 % interval over the data (over the probes where the error over the data is unknown).
    All lines of a panel see the same samples, so that the difference of two lines is surer than their bands suggest.
    The axis is logarithmic where the traces span more than a factor of ten.

    From records of the probe `hessian_trace`; raises `NothingToDraw` if they hold none.
    """
    rows = totals(records)
    if rows.empty:
        raise NothingToDraw("no finite trace among the records")
    panels = list(rows.groupby(["model", "dataset"], sort=True))
    lines = max(panel.groupby(LINE).ngroups for _, panel in panels)
    # As high as the legend needs, and wider for its longer lines.
    size = (5.2 if lines < 10 else 6.6) * len(panels), max(3.2, 0.2 * lines)
    figure = Figure(figsize=size, layout="constrained")
    for index, ((model, dataset), panel) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _draw_panel(axes, panel)
        axes.set_title(f"{model}, {dataset}")
    return figure


def _draw_panel(axes: Axes, panel: pd.DataFrame) -> None:
    methods = sorted(panel["method"].unique())
    quantized = bool((panel["bits"] != "FP").any())
    ends = []
    drawn_values = []
    groups = panel.groupby(LINE, sort=True)
    # Runs measured at one epoch each stand side by side there, so that their bars are told apart.
    apart = 0.05 if groups.size().max() == 1 else 0.0
    for place, (_, line) in enumerate(groups):
        line = line.sort_values("epoch")
        method, bits = str(line["method"].iloc[0]), str(line["bits"].iloc[0])
        color = colour(method, methods)
        error = line["ci95"]
        text = _legend(line, panel)
        if quantized and bits == "FP":
            value, spread = line["value"].iloc[-1], error.iloc[-1]
            drawn = axes.axhline(value, color=color, linewidth=1.2, label=f"{text}, epoch {line['epoch'].iloc[-1]}")
            axes.axhspan(value - spread, value + spread, color=color, alpha=0.12, linewidth=0)
            drawn_values.append(value)
        else:
            x = line["epoch"] + apart * (place - (groups.ngroups - 1) / 2)
            (drawn,) = axes.plot(x, line["value"], label=text, **line_style(method, bits, methods))
            band(axes, x, line["value"], error, color)
            drawn_values += list(line["value"])
        ends.append((line["value"].iloc[-1], drawn))
    epoch_axis(axes)
    axes.set_ylabel("Trace of the Hessian")
    low, high = min(drawn_values), max(drawn_values)
    if log_if_wide(axes, low, high, "{x:,.0f}"):
        axes.set_ylim(0.5 * low, 2 * high)
    else:
        axes.set_ylim(bottom=min(0.0, 1.1 * low))
    legend_by_ends(axes, ends)


def _legend(line: pd.DataFrame, panel: pd.DataFrame) -> str:
    """Method and bits, and as much more as tells this line from the panel's others."""
    first = line.iloc[0]
    several = [str(first[column]) for column in ("definition", "estimator") if panel[column].nunique() > 1]
    return ", ".join([run_label(first, panel), *several])


def caption5(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure: definition, method, data, seeds, sample size."""
    rows = totals(records)
    several = partial(distinct, rows)
    return (
        f"Trace of the Hessian of the {mean_loss(rows)} against the epoch (definition: {several('definition')}; "
        f"estimator: {several('estimator')}), BatchNorm in eval mode, on {several('n_data')} {samples_of(rows)} "
        f"without augmentation (sample seed {several('seed')}; the same samples for every line). Data: "
        f"{several('dataset')}; network: {several('model')}; training seed "
        f"{several('train_seed')}. Bands or bars: 95 % interval over the samples, not over training runs."
    )
