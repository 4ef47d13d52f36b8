"""Figure 1 of the paper: how much the prediction varies under noise in the input."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.methods import method_label, method_rank
from fpq_analysis.plots.style import colour, legend_by_ends, line_style, style
from fpq_analysis.records.queries import distinct, nearest, samples_of, variances

SD = 0.1  # of the bars, where it was measured
HATCHES = {"W2A4": "////", "W2A2": "xxxx"}
# The paper's bit widths in its order; others come after.
BITS = ("FP", "W4A4", "W2A4")
WHAT = {"logit_variance": "logits", "probability_variance": "class probabilities"}


@style()
def figure1(records: pd.DataFrame, *, quantity: str = "logit_variance", sd: float = SD) -> Figure:
    """Variance of the output at each run's last epoch: bars at one size of noise, beside all sizes on logarithmic axes.

    A row of two panels for each network and data set.  One run: its value with the 95 % interval over the samples.
    Several training seeds of a method and bits: their mean, plus and minus one standard deviation over the seeds, with
    the runs as points.  All see the same samples with the same noise, so that a difference is surer than the intervals
    suggest.

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
    panels = list(rows.groupby(["model", "dataset"], sort=True))
    figure = Figure(figsize=(7.2, 2.9 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (bars, sweep), ((model, dataset), panel) in zip(grid, panels, strict=True):
        _draw_bars(bars, panel, nearest(panel, sd))
        _draw_sweep(sweep, panel)
        bars.set_ylabel(f"Variance of the {WHAT[quantity]}")
        bars.set_title(f"{model}, {dataset}: noise sd {nearest(panel, sd):g}")
        sweep.set_title("All sizes of noise")
    return figure


def groups(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(method, bits, rows), in the order of the catalogue and of the paper."""

    def place(key: tuple[str, str]) -> tuple[int, int, str, str]:
        method, bits = key
        return method_rank(method), BITS.index(bits) if bits in BITS else len(BITS), method, bits

    by_key = {(str(m), str(b)): group for (m, b), group in rows.groupby(["method", "bits"])}
    for method, bits in sorted(by_key, key=place):
        yield method, bits, by_key[method, bits]


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """By sd: the mean over runs; `error`: one run's 95 % interval, or the standard deviation over several runs."""
    table = rows.groupby("sd").agg(value=("value", "mean"), error=("value", "std"), ci95=("ci95", "first"))
    return table.assign(error=table["ci95"] if rows["run"].nunique() == 1 else table["error"])


def _draw_bars(axes: Axes, panel: pd.DataFrame, sd: float) -> None:
    methods = sorted(panel["method"].unique())
    names = []
    for place, (method, bits, rows) in enumerate(groups(panel[panel["sd"] == sd])):
        table = over_seeds(rows)
        value, error = float(table["value"].iloc[0]), float(table["error"].iloc[0])
        color, hatch = colour(method, methods), HATCHES.get(bits, "")
        axes.bar(place, value, 0.7, color=color, alpha=0.85, hatch=hatch, edgecolor="white")
        axes.errorbar(place, value, error, color="0.15", capsize=3, linewidth=1.0, fmt="none")
        if len(rows) > 1:
            spots = place + 0.22 * np.linspace(-1, 1, len(rows))
            axes.plot(spots, rows["value"], "o", color="0.15", markersize=2.5, markerfacecolor="white")
        names.append(method_label(method, bits).replace(" ", "\n"))
    axes.xaxis.set_major_locator(FixedLocator(list(range(len(names)))))
    axes.set_xticklabels(names)
    axes.grid(False, axis="x")
    axes.set_ylim(bottom=0)


def _draw_sweep(axes: Axes, panel: pd.DataFrame) -> None:
    methods = sorted(panel["method"].unique())
    ends: list[tuple[float, Any]] = []
    starts = []
    for method, bits, rows in groups(panel):
        table = over_seeds(rows)
        drawn = axes.errorbar(
            table.index,
            table["value"],
            table["error"],
            **line_style(method, bits, methods),
            capsize=2,
            elinewidth=1.0,
            label=method_label(method, bits),
        )
        starts.append(table["value"].iloc[0])
        ends.append((table["value"].iloc[-1], drawn))
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    sds = sorted(map(float, panel["sd"].unique()))
    if min(starts) > 0:
        guide = [0.5 * min(starts) * (x / sds[0]) ** 2 for x in sds]
        (line,) = axes.plot(sds, guide, ":", color="0.5", linewidth=1.0, label="∝ sd²")
        ends.append((guide[-1], line))
    axes.xaxis.set_major_locator(FixedLocator(sds))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_locator(LogLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("Sd of the noise in the input")
    legend_by_ends(axes, ends)


def caption1(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure: what varies, under which noise, data, seeds, what the bars are."""
    rows = variances(records)
    several = partial(distinct, rows)
    seeds = rows.groupby(["model", "dataset", "method", "bits"])["run"].nunique()
    bars = "95 % interval over the samples, draws of the noise included, of one training run each"
    if (seeds > 1).any():
        several_runs = ", ".join(map(str, sorted(seeds[seeds > 1].unique())))
        bars = (
            f"mean and ± one standard deviation over training runs ({several_runs} each; points: the runs); where "
            "there is one run, the 95 % interval over the samples"
        )
    return (
        "Variance of the logits under Gaussian noise in the input, unbiased over the draws, mean over classes and "
        "samples, at each run's last epoch. The noise's standard deviation is in units of the normalised input; "
        f"{several('n_data')} {samples_of(rows)} without augmentation (seed {several('seed')}; the same samples and "
        f"noise for every run), quantized activations really rounded. Data: {several('dataset')}; network: "
        f"{several('model')}; training seed {several('train_seed')}; epoch {several('epoch')}. Error bars: {bars}. "
        "Dotted: a linear response, whose variance is proportional to sd²."
    )
