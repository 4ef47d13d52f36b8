"""The spectral density of the Hessian."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.style import at_epoch, colour, panels, powers_of_ten, style
from fpq_analysis.records.queries import distinct, mean_loss, samples_of

POINTS = 800
WIDTH = 0.01  # of the Gaussian that smooths, relative to the range of the eigenvalues
FLOOR = 1e-6


@style()
def density_figure(records: pd.DataFrame) -> Figure:
    """Density of the eigenvalues at each run's first and last measured epoch, on a logarithmic axis.

    Lanczos nodes are smoothed by a Gaussian whose width is 1 % of the range; the band is one standard error over the
    runs.  Triangles mark nodes that stand alone at the upper end: the outliers.

    From records of the probe `hessian_density`; raises `NothingToDraw` if they hold none.
    """
    rows = records[records["quantity"].str.match(r"(nodes|weights)_\d+$") & records["samples"].notna()]
    if rows.empty:
        raise NothingToDraw("no spectral density among the records")
    methods = sorted(rows["method"].unique())
    figure, parts = panels(rows, (3.4, 2.7), shared=True)
    for axes, panel in parts:
        color = colour(panel["method"].iloc[0], methods)
        epochs = sorted({panel["epoch"].min(), panel["epoch"].max()})
        for epoch in epochs:
            last = epoch == epochs[-1]
            rows_here = panel[panel["epoch"] == epoch]
            nodes, weights = _samples(rows_here, "nodes"), _samples(rows_here, "weights")
            _draw(axes, nodes, weights, color if last else "0.55", at_epoch("", epoch), last)
        _name_axes(axes)
        if epochs != [""]:
            axes.legend(loc="upper right")
    return figure


@style()
def measure_figure(nodes: np.ndarray, weights: np.ndarray) -> Figure:
    """The same of bare Lanczos nodes and weights, (runs, steps) each; of a single run without a band."""
    figure = Figure(figsize=(3.4, 2.7), layout="constrained")
    axes = figure.subplots()
    _draw(axes, nodes, weights, colour("fp", ["fp"]), "", True)
    _name_axes(axes)
    return figure


def _samples(rows: pd.DataFrame, kind: str) -> np.ndarray:
    return np.array(rows[rows["quantity"].str.startswith(kind)].sort_values("quantity")["samples"].tolist())


def _draw(axes: Axes, nodes: np.ndarray, weights: np.ndarray, color: str, text: str, outliers: bool) -> None:
    low, high = nodes.min(), nodes.max()
    scale = WIDTH * (high - low) or 1.0
    grid = np.linspace(low - 5 * scale, high + 5 * scale, POINTS)
    runs = np.stack(
        [
            np.exp(-0.5 * ((grid[:, None] - x) / scale) ** 2) @ w / (scale * np.sqrt(2 * np.pi))
            for x, w in zip(nodes, weights, strict=True)
        ]
    )
    mean = runs.mean(0)
    axes.plot(grid, np.maximum(mean, FLOOR / 10), color=color, linewidth=1.0, label=text)
    if len(runs) > 1:
        error = runs.std(0, ddof=1) / np.sqrt(len(runs))
        ends = np.maximum(mean - error, FLOOR / 10), np.maximum(mean + error, FLOOR / 10)
        axes.fill_between(grid, *ends, color=color, alpha=0.2, lw=0)
    if outliers:
        alone = standing_alone(nodes, 4 * scale)
        axes.plot(alone, np.full(len(alone), 2 * FLOOR), "^", color=color, markersize=4, clip_on=False)


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
        "1 % of the range; bands: one standard error over the vectors; triangles: outliers. BatchNorm in eval mode, "
        f"{several('n_data')} {samples_of(records)} without augmentation (seed {several('seed')})."
    )
