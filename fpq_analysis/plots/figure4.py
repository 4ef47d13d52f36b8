"""Figure 4 of the paper: the density of one layer's features for single samples: float, LSQ, FPQ."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.methods import method_label, method_rank
from fpq_analysis.plots.figure3 import bits_of, layer_rows
from fpq_analysis.plots.style import colour, style
from fpq_analysis.records.queries import distinct, samples_of

IN_PAPER = ("fp", "lsq", "fpq")  # the paper's; other methods where there is none of these
LINES = {"fp": "-", "lsq": "--", "fpq": "-."}  # not by colour alone
BINS = 36  # drawn, at most

Density = tuple[np.ndarray, np.ndarray]


def densities(records: pd.DataFrame) -> pd.DataFrame:
    """The rows with a density, of each run's last epoch; of runs alike but for the training seed, the first seed's."""
    rows = layer_rows(records)
    rows = rows[rows["quantity"].str.startswith("density_")]
    if rows["method"].isin(IN_PAPER).any():
        rows = rows[rows["method"].isin(IN_PAPER)]
    alike = ["model", "dataset", "data", "bits", "method"]
    first = rows.sort_values(["train_seed", "run"]).groupby(alike)["run"].transform("first")
    return rows[rows["run"] == first.reindex(rows.index)]


@style()
def figure4(records: pd.DataFrame) -> Figure:
    """Densities of the layer's values for three samples; a row for each network, data set and bit width.

    Values that are exactly zero, which a ReLU makes, have no density: their share stands in the legend, and each curve
    integrates to what is left.  The curves of a panel are histograms on one grid.

    From records of the probe `features`; raises `NothingToDraw` if they hold none.
    """
    rows = densities(records)
    if rows.empty:
        raise NothingToDraw("no density of features among the records")
    bands = _bands(rows)
    n_images = max(int(band["quantity"].str.match(r"density_\d+$").groupby(band["run"]).sum().max()) for band in bands)
    methods = sorted(records["method"].unique())
    several = rows[["model", "dataset"]].drop_duplicates().shape[0] > 1
    figure = Figure(figsize=(2.75 * n_images, 2.3 * len(bands) + 0.2), layout="constrained")
    for down, band in enumerate(bands):
        edges = _grid(band)
        first: Axes | None = None
        highest = 0.0
        for image in range(n_images):
            axes = figure.add_subplot(len(bands), n_images, down * n_images + image + 1, sharey=first)
            first = first or axes
            _draw(axes, band, image, edges, methods)
            if down == 0 or several:
                axes.set_title(_image_title(band, image))
            if down == len(bands) - 1:
                axes.set_xlabel("Activation")
            axes.tick_params(labelleft=image == 0)
            highest = max(axes.dataLim.ymax, highest)
            axes.set_ylim(0, 1.05 * highest)
            if image == 0:
                run = band.iloc[-1]
                what = f"{run['model']}, {run['dataset']}\n" if several else ""
                bits = f"{run['bits']}: " if run["bits"] != "FP" else ""
                axes.set_ylabel(f"{what}{bits}density")
    return figure


def _bands(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of one row of panels each: all runs of one bit width, with the float run, which comes first."""
    found = []
    for _, group in rows.groupby(["model", "dataset"], sort=True):
        widths = sorted((set(group["bits"]) - {"FP"}) or {"FP"}, key=bits_of, reverse=True)
        for width in widths:
            band = group[group["bits"].isin(["FP", width])]
            found.append(band.sort_values("method", key=lambda names: names.map(method_rank), kind="stable"))
    return found


def _samples(rows: pd.DataFrame, quantity: str) -> np.ndarray:
    return np.asarray(rows.loc[rows["quantity"] == quantity, "samples"].iloc[0], dtype=float)


def _grid(band: pd.DataFrame) -> np.ndarray:
    """Edges that hold every run's: their widths are powers of two, so the widest, or twice it, fits all."""
    edges = [_samples(run, "density_edges") for _, run in band.groupby("run")]
    low, high = min(e[0] for e in edges), max(e[-1] for e in edges)
    width = max(e[1] - e[0] for e in edges)
    while (high - low) / width > BINS:
        width *= 2
    return np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width


def _draw(axes: Axes, band: pd.DataFrame, image: int, grid: np.ndarray, methods: list[str]) -> None:
    import seaborn as sns  # half a second, and no other figure needs it

    for _, run in band.groupby("run", sort=False):
        first = run.iloc[0]
        quantity = f"density_{image + 1}"
        if quantity not in set(run["quantity"]):
            continue
        zeros = 1 - float(run.loc[run["quantity"] == quantity, "value"].iloc[0])
        color = colour(first["method"], methods)
        text = method_label(first["method"], "FP") + (f", {100 * zeros:.0f} % zeros" if zeros > 0 else "")
        # The bins of a run fit into those of the grid: the mass of each is summed.
        edges = _samples(run, "density_edges")
        mass = _samples(run, quantity) * np.diff(edges) / (grid[1] - grid[0])
        heights = pd.DataFrame({"middle": (edges[:-1] + edges[1:]) / 2, "mass": mass})
        line: dict[str, Any] = {"linewidth": 1.2, "linestyle": LINES.get(first["method"], "-"), "label": text}
        for look in ({"alpha": 0.10, "linewidth": 0}, {"fill": False, **line}):
            sns.histplot(
                heights,
                x="middle",
                weights="mass",
                bins=list(grid),
                element="step",
                color=color,
                ax=axes,
                **look,
            )
    axes.set(xlim=(grid[0], grid[-1]), xlabel="", ylabel="")
    axes.legend(loc="upper right", fontsize=7.5, handlelength=1.8, borderaxespad=0.2)


def _image_title(band: pd.DataFrame, image: int) -> str:
    images = _samples(band[band["run"] == band["run"].iloc[0]], "density_images")
    return f"Sample {images[image]:.0f}" if image < len(images) else ""


def caption4(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure: layer, samples, runs, what the curves leave out."""
    rows = densities(records)
    several = partial(distinct, rows)
    n_data = rows.loc[rows["quantity"] == "density_images", "n_data"].max()
    runs = ", ".join(f"{one.run} at epoch {one.epoch}" for one in rows.drop_duplicates("run").itertuples(index=False))
    return (
        f"Density of the output of {several('layer')} ({several('model')}, {several('dataset')}) for single "
        f"{samples_of(rows)}, drawn by seed {several('seed')} from the {n_data} measured on, the same for every run; "
        "numbers are places in that sample. Histograms over channels and places on a common grid; values that are "
        "exactly zero are left out, their share is in the legend. Raw output, before the next layer's quantizer. "
        f"Runs: {runs}; training seed {several('train_seed')}. No error is shown: these are single samples."
    )
