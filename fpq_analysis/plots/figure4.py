"""Figure 4 of the paper: the density of one layer's features for single samples: float, LSQ, FPQ."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import erf

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.methods import bits_rank
from fpq_analysis.plots.axes import head, legend, panels
from fpq_analysis.plots.figure3 import layer_rows
from fpq_analysis.plots.names import Looks, family_title, method_title, subject, titles
from fpq_analysis.plots.style import COLUMNS, style
from fpq_analysis.records.queries import distinct, ordered, samples_of
from fpq_analysis.records.seeds import families
from fpq_analysis.text import listed

IN_PAPER = ("fp", "lsq", "fpq")  # the paper's; other methods where there is none of these
BANDWIDTH = 0.25  # standard deviation of the kernel, in standard deviations of the values that are not zero
POINTS = 400  # of a curve


def densities(records: pd.DataFrame) -> pd.DataFrame:
    """The rows with a density, of each run's last epoch; of runs that differ by their seed alone, the first seed's."""
    rows = layer_rows(records)
    rows = rows[rows["quantity"].str.startswith("density_")]
    if rows["method"].isin(IN_PAPER).any():
        rows = rows[rows["method"].isin(IN_PAPER)]
    return rows[rows["run"].isin({one.sort_values(["train_seed", "run"])["run"].iloc[0] for one in families(rows)})]


@style()
def figure4(records: pd.DataFrame) -> Figure:
    """Densities of the layer's values for three samples; a row for each network, data set and bit width.

    Values that are exactly zero, which a ReLU makes, have no density: their share stands in the caption, and each curve
    integrates to what is left.  The histograms of the records are smoothed by a Gaussian, one for all curves of a row;
    where no value is negative, what it would put below zero is reflected.

    From records of the probe `features`; raises `NothingToDraw` if they hold none.
    """
    rows = densities(records)
    if rows.empty:
        raise NothingToDraw("no density of features among the records")
    found = _bands(rows)
    n_images = max(int(band["quantity"].str.match(r"density_\d+$").groupby(band["run"]).sum().max()) for band in found)
    looks = Looks(families(rows))
    several = rows[["model", "dataset"]].drop_duplicates().shape[0] > 1
    # In two columns a row for each width, in one column, if there is room, a column for each.
    wide = COLUMNS.get() == 2
    order = [(band, image) for band in found for image in range(n_images)]
    if not wide:
        order.sort(key=lambda one: one[1])
    beside = n_images if wide else len(found) if len(found) < 3 else 1
    figure, places = panels(len(order), 1.6, across=(beside, beside))
    artists, highest = [], dict.fromkeys(map(id, found), 0.0)
    for axes, (band, image) in zip(places, order, strict=True):
        lines = _draw(axes, band, image, looks)
        highest[id(band)] = max([highest[id(band)], *(float(np.max(line.get_ydata())) for line in lines)])
        artists += lines
    for i, (axes, (band, image)) in enumerate(zip(places, order, strict=True)):
        axes.set_ylim(0, 1.08 * highest[id(band)])
        about = [subject(band.iloc[0])] if several else []
        bits = band["bits"].iloc[-1]
        words = [*about, *([] if bits == "FP" else [bits]), _image_title(band, image)]
        head(axes, (", " if wide or beside == 1 else "\n").join(words))
        axes.set_ylabel("" if i % beside else "Density")
        axes.set_xlabel("Activation" if i + beside >= len(order) else "")
    legend(figure, artists)
    return figure


def _bands(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of one row of panels each: all runs of one bit width, with the float run, which comes first."""
    found = []
    for _, group in rows.groupby(["model", "dataset"], sort=True):
        for width in sorted((set(group["bits"]) - {"FP"}) or {"FP"}, key=bits_rank):
            found.append(ordered(group[group["bits"].isin(["FP", width])]))
    return found


def bandwidth(band: pd.DataFrame) -> float:
    """Of the kernel for these runs, in units of the activations."""
    moments = []
    for _, run in band.groupby("run"):
        edges = _samples(run, "density_edges")
        middles = (edges[:-1] + edges[1:]) / 2
        for quantity in run.loc[run["quantity"].str.match(r"density_\d+$"), "quantity"]:
            mass = _samples(run, quantity) * np.diff(edges)
            moments.append([mass @ middles**power for power in (0, 1, 2)])
    mass, first, second = np.sum(moments, axis=0)
    spread = math.sqrt(max(second / mass - (first / mass) ** 2, 0.0)) if mass else 0.0
    return BANDWIDTH * spread or 1.0


def smooth(edges: np.ndarray, density: np.ndarray, width: float, reflect: bool, x: np.ndarray) -> np.ndarray:
    """A histogram convolved with a Gaussian of standard deviation `width`, at `x`.

    Args:
        reflect: whether what lies below zero is folded back.
    """

    def below(at: np.ndarray) -> np.ndarray:
        """The Gaussian's distribution function about each edge, (points, edges)."""
        return 0.5 * (1 + erf((at[:, None] - edges) / (width * math.sqrt(2))))

    found = (below(x)[:, :-1] - below(x)[:, 1:]) @ density
    return found + (below(-x)[:, :-1] - below(-x)[:, 1:]) @ density if reflect else found


def _samples(rows: pd.DataFrame, quantity: str) -> np.ndarray:
    return np.asarray(rows.loc[rows["quantity"] == quantity, "samples"].iloc[0], dtype=float)


def _draw(axes: Axes, band: pd.DataFrame, image: int, looks: Looks) -> list[Any]:
    runs = [(run.iloc[0], run) for _, run in band.groupby("run", sort=False)]
    edges = [_samples(run, "density_edges") for _, run in runs]
    low, high, width = min(e[0] for e in edges), max(e[-1] for e in edges), bandwidth(band)
    reflect = low >= 0
    x = np.linspace(0.0 if reflect else low - 3 * width, high + 3 * width, POINTS)
    quantity = f"density_{image + 1}"
    lines: list[Any] = []
    for first, run in runs:
        if quantity in set(run["quantity"]):
            y = smooth(_samples(run, "density_edges"), _samples(run, quantity), width, reflect, x)
            color = looks.colour(first)
            if not lines:  # what the others are held against
                axes.fill_between(x, 0, y, color=color, alpha=0.1, linewidth=0)
            lines += axes.plot(x, y, color=color, linestyle=looks.dash(first), label=family_title(run, band))
    axes.set_xlim(x[0], x[-1])
    return lines


def _image_title(band: pd.DataFrame, image: int) -> str:
    images = _samples(band[band["run"] == band["run"].iloc[0]], "density_images")
    return f"sample {images[image]:.0f}" if image < len(images) else ""


def caption4(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure: layer, samples, runs, what the curves leave out."""
    rows = densities(records)
    several = partial(distinct, rows)
    n_data = rows.loc[rows["quantity"] == "density_images", "n_data"].max()
    runs = ", ".join(f"{one.run} at epoch {one.epoch}" for one in rows.drop_duplicates("run").itertuples(index=False))
    shown = rows[rows["quantity"].str.match(r"density_\d+$")]
    zeros = (100 * (1 - shown["value"])).groupby(shown["method"]).agg(["min", "max"]).round()
    shares = listed(
        f"{method_title(method)} {listed([f'{low:.0f}', f'{high:.0f}'], 'to')} %"
        for method, low, high in zeros.loc[list(dict.fromkeys(ordered(shown)["method"]))].itertuples()
    )
    widths = listed([f"{bandwidth(band):.2g}" for band in _bands(rows)], "and")
    return (
        f"Density of the output of {several('layer')} ({titles(rows, 'model')}, {titles(rows, 'dataset')}) for single "
        f"{samples_of(rows)}, drawn by seed {several('seed')} from the {n_data} measured on, the same for every run; "
        "numbers are places in that sample. Over channels and places; smoothed by a Gaussian of standard deviation "
        f"{widths}, reflected at zero where no value is negative. Values that are exactly zero ({shares}) are left "
        "out, so that the curves integrate to the rest. Raw output, before the next layer's quantizer. "
        f"Runs: {runs}; training seed {several('train_seed')}. No error is shown: these are single samples."
    )
