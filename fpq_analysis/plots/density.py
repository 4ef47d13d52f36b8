"""The spectral density of the Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import head, kinds, outer, panels, powers_of_ten
from fpq_analysis.plots.names import SPARE_COLOURS, Looks, at_epoch, titles
from fpq_analysis.plots.style import style
from fpq_analysis.records.comparison import MIN_SEEDS
from fpq_analysis.records.queries import distinct, mean_loss, samples_of
from fpq_analysis.records.seeds import families

POINTS = 800
WIDTH = 0.01  # of the Gaussian that smooths, relative to the range of the eigenvalues
FLOOR = 1e-6

Measure = tuple[np.ndarray, np.ndarray]  # nodes and weights of one run, (random vectors, steps) each


@style()
def density_figure(records: pd.DataFrame) -> Figure:
    """Density of the eigenvalues at the first and last measured epoch, on a logarithmic axis.

    A panel for the runs that differ by their seed alone: their mean, and thin lines for each of several.  Lanczos nodes
    are smoothed by a Gaussian whose width is 1 % of the range.  The band is one standard error over the random vectors
    of a single run, and over three seeds or more.  Triangles mark nodes that stand alone at the upper end of a run's
    spectrum: the outliers.

    From records of the probe `hessian_density`; raises `NothingToDraw` if they hold none.
    """
    rows = records[records["quantity"].str.match(r"(nodes|weights)_\d+$") & records["samples"].notna()]
    if rows.empty:
        raise NothingToDraw("no spectral density among the records")
    looks = Looks(families(rows))
    found = kinds(rows)
    figure, places = panels(len(found), 1.9, sharey=True)
    for axes, (text, panel) in zip(places, found, strict=True):
        color = looks.colour(panel.iloc[0])
        epochs = sorted({panel["epoch"].min(), panel["epoch"].max()})
        for epoch in epochs:
            last = epoch == epochs[-1]
            runs = [_samples(run) for _, run in panel[panel["epoch"] == epoch].groupby("run", sort=False)]
            _draw(axes, runs, color if last else "0.45", at_epoch("", epoch), last)
        _name_axes(axes)
        head(axes, text)
        if epochs != [""]:
            axes.legend(loc="upper right", borderaxespad=0)
    low, high = np.log10(places[0].get_ylim())
    entries = max(len(axes.get_legend_handles_labels()[0]) for axes in places)
    places[0].set_ylim(top=10 ** (low + (high - low) / (1 - 0.13 * entries)))  # room for the legends; of all panels
    outer(places, x=False)
    return figure


@style()
def measure_figure(nodes: np.ndarray, weights: np.ndarray) -> Figure:
    """The same of bare Lanczos nodes and weights, (runs, steps) each; of a single run without a band."""
    figure, (axes,) = panels(1, 2.3)
    _draw(axes, [(nodes, weights)], SPARE_COLOURS[0], "", True)
    _name_axes(axes)
    return figure


def _samples(run: pd.DataFrame) -> Measure:
    by_name = run.sort_values("quantity").groupby(run["quantity"].str.startswith("nodes"))["samples"]
    return np.array(by_name.get_group(True).tolist()), np.array(by_name.get_group(False).tolist())


def _draw(axes: Axes, runs: Sequence[Measure], color: str, text: str, outliers: bool) -> None:
    """One curve, dashed without `outliers`; `runs`: differ by their training seed."""
    low, high = min(nodes.min() for nodes, _ in runs), max(nodes.max() for nodes, _ in runs)
    scale = WIDTH * (high - low) or 1.0
    grid = np.linspace(low - 5 * scale, high + 5 * scale, POINTS)
    smooth = [
        np.stack(
            [
                np.exp(-0.5 * ((grid[:, None] - x) / scale) ** 2) @ w / (scale * np.sqrt(2 * np.pi))
                for x, w in zip(nodes, weights, strict=True)
            ]
        )
        for nodes, weights in runs
    ]
    each = smooth[0] if len(runs) == 1 else np.stack([one.mean(0) for one in smooth])
    mean = each.mean(0)
    line = "-" if outliers else "--"
    axes.plot(grid, np.maximum(mean, FLOOR), line, color=color, linewidth=1.0, label=text)
    if len(each) >= (2 if len(runs) == 1 else MIN_SEEDS):
        error = each.std(0, ddof=1) / np.sqrt(len(each))
        ends = np.maximum(mean - error, FLOOR), np.maximum(mean + error, FLOOR)
        axes.fill_between(grid, *ends, color=color, alpha=0.2, lw=0)
    for one in each if len(runs) > 1 else ():
        axes.plot(grid, np.maximum(one, FLOOR), line, color=color, linewidth=0.5, alpha=0.5, label="_")
    if outliers:
        alone = np.concatenate([standing_alone(nodes, 4 * scale) for nodes, _ in runs])
        axes.plot(alone, np.full(len(alone), 2 * FLOOR), "^", color=color, markersize=3.5, mew=0, label="_")


def _name_axes(axes: Axes) -> None:
    axes.set_yscale("log")
    powers_of_ten(axes.yaxis)
    axes.set_ylim(bottom=FLOOR)
    axes.set_xlabel("Eigenvalue")
    axes.set_ylabel("Density")


def standing_alone(nodes: np.ndarray, gap: float) -> np.ndarray:
    """Upper nodes that all runs agree on and that are further than `gap` from what lies below them.

    Args:
        nodes: (runs, steps), ascending in each run.

    Returns:
        The means over the runs, from the largest down.
    """
    found = []
    for place in range(1, nodes.shape[1]):
        here, below = nodes[:, -place], nodes[:, -place - 1]
        if here.max() - here.min() > gap or here.min() - below.max() < gap:
            break
        found.append(here.mean())
    return np.array(found)


def density_caption(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    several = partial(distinct, records)
    runs = records["quantity"].str.startswith("nodes_").groupby(records["key"]).sum().max()
    return (
        f"Spectral density of the Hessian of the {mean_loss(records)} (definition: "
        f"{several('definition')}) by stochastic Lanczos quadrature ({runs} random vectors), smoothed by a Gaussian of "
        "1 % of the range; bands: one standard error, over the vectors of a single run, over training seeds from "
        f"{MIN_SEEDS} on (thin lines: each seed); triangles: outliers. BatchNorm in eval mode, {several('n_data')} "
        f"{samples_of(records)} without augmentation (seed {several('seed')}). Data: {titles(records, 'dataset')}; "
        f"network: {titles(records, 'model')}; training seed {several('train_seed')}."
    )
