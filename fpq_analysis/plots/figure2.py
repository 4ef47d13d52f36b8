"""Figure 2 of the paper: gradient norm against the epoch, with noise in the features and in the weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.methods import BASELINE
from fpq_analysis.plots.style import band, epoch_axis, log_if_wide, run_label, style
from fpq_analysis.records.queries import distinct, mean_loss, norms, samples_of

TRAINED = {"noise-features": "features", "noise-weights": "weights"}
# By the kind of noise, not by the method: these colours are this figure's own.
LOOKS: dict[str, dict[str, Any]] = {
    "features": {"color": "#0072B2", "marker": "o", "label": "noise in the features"},
    "weights": {"color": "#E69F00", "marker": "s", "label": "noise in the weights"},
    "clean": {"color": "0.5", "linestyle": "--", "linewidth": 1.0, "marker": "", "label": "no noise"},
}


@style()
def figure2(records: pd.DataFrame, *, quantity: str = "grad_norm_minibatch") -> Figure:
    """Gradient norm against the epoch, with noise of one quantization step.

    As in the paper, if there are runs trained with noise in the features or the weights (methods `noise-features`,
    `noise-weights`): each with the noise it was trained with, a panel for each network, data set and bits.  Otherwise
    the LSQ runs (without any, every quantized run), a panel each, in both kinds of noise and without.

    The norm drawn is that of minibatches, as an optimizer meets it, not that of the gradient over all data measured
    on: the latter depends on how many they are once it is small, since the noise of sampling them does not vanish with
    it.  The axes are logarithmic where the norms span more than a factor of ten.

    Args:
        records: of the probe `gradnorm`; columns as in `records.COLUMNS`.
        quantity: `grad_norm_minibatch`, or `grad_norm` for that over all data.

    Raises:
        NothingToDraw: if there is nothing to draw.
    """
    panels = list(_panels(norms(records, quantity)))
    if not panels:
        raise NothingToDraw(f"no finite {quantity} in noise among the records")
    everything = pd.concat([lines["value"] for _, lines in panels])
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.4 * across + 0.6, 2.8 * down), layout="constrained")
    for index, (title, lines) in enumerate(panels):
        axes = figure.add_subplot(down, across, index + 1)
        _draw_panel(axes, lines, (everything.min(), everything.max()))
        axes.set_title(title)
        if index % across == 0:
            axes.set_ylabel(f"Gradient norm, {lines['estimator'].iloc[0]}")
    return figure


def _panels(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(title, rows of the lines in it)."""
    trained = trained_in_noise(rows)
    if not trained.empty:
        for (model, dataset, bits), panel in trained.groupby(["model", "dataset", "bits"], sort=True):
            yield f"{model}, {dataset}, {bits}", panel
        return
    rows = _with_noise(rows)
    for (_, definition), panel in rows.groupby(["run", "definition"], sort=True):
        title = run_label(panel.iloc[0], rows)
        yield title + (f", {definition}" if rows["definition"].nunique() > 1 else ""), panel


def trained_in_noise(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the runs that were trained in noise, the arm of that noise."""
    return rows[rows["method"].map(TRAINED) == rows["arm"]]


def _with_noise(rows: pd.DataFrame) -> pd.DataFrame:
    """The baseline's runs, or else every run, that has an arm in noise."""
    rows = rows[rows["run"].isin(rows.loc[rows["arm"] != "clean", "run"])]
    return rows[rows["method"] == BASELINE] if (rows["method"] == BASELINE).any() else rows


def _draw_panel(axes: Axes, panel: pd.DataFrame, span: tuple[float, float]) -> None:
    """`span`: the least and the largest value of all panels, so that they have one kind of axis."""
    for arm, look in LOOKS.items():
        rows = panel[panel["arm"] == arm]
        for run, line in rows.groupby("run", sort=True):
            line = line.sort_values("epoch")
            text = look["label"] + (f" ({run})" if rows["run"].nunique() > 1 else "")
            axes.plot(line["epoch"], line["value"], **{**look, "label": text})
            band(axes, line["epoch"], line["value"], line["ci95"], look["color"], alpha=0.18)
    low, high = panel["value"].min(), panel["value"].max()
    if log_if_wide(axes, *span):
        axes.set_ylim(0.5 * low, 2 * high)
    else:
        axes.set_ylim(0, 1.4 * high)  # by the values: an interval from few minibatches may go far beyond
    epoch_axis(axes)
    axes.legend()


def caption2(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure: which norm, which noise, definition, data, seeds, bands."""
    rows = norms(records)
    trained = trained_in_noise(rows)
    drawn = _with_noise(rows) if trained.empty else trained
    several = partial(distinct, drawn)
    counts = drawn[drawn["arm"] != "clean"].groupby("arm")["n_products"].max()
    draws = f"{counts.max():g}"
    if counts.nunique() > 1:
        draws = " and ".join(f"{n:g} ({arm})" for arm, n in counts.items())
    runs = "each run in the noise it was trained with" if len(trained) else "runs trained without noise"
    return (
        f"Euclidean norm of the gradient of the {mean_loss(drawn)} with respect to the weights (definition: "
        f"{several('definition')}), mean over {several('estimator')} and {draws} draws of the noise, against the "
        f"epoch: {runs}. Noise: uniform, one quantization step wide, in the input (features) or the quantized weight "
        f"(weights) of every convolution. BatchNorm in eval mode, {several('n_data')} {samples_of(drawn)} without "
        f"augmentation (seed {several('seed')}; the same samples and noise for every line). Data: "
        f"{several('dataset')}; network: {several('model')}; {several('bits')}; training seed "
        f"{several('train_seed')}. Bands: 95 % interval over minibatches and draws, not over training runs."
    )
