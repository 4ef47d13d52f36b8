"""Figure 3 of the paper: every channel of one layer, float above and quantized below, and how far its mean moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.intervals import Z95
from fpq_analysis.methods import bits_rank
from fpq_analysis.plots.axes import head, legend, outer, panels
from fpq_analysis.plots.names import Looks, at_epoch, kind, subject
from fpq_analysis.plots.style import style
from fpq_analysis.records.queries import last_epochs, samples_of
from fpq_analysis.records.seeds import families

MOST = 32  # channels, as in the paper
MEAN = "#E69F00"  # the paper's orange line
# Its edge is dark, so that it is seen on its box in grey, too.
EDGE = [withStroke(linewidth=2.4, foreground="0.25")]
LINE: dict[str, Any] = {"color": MEAN, "linewidth": 1.5, "linestyle": "-", "path_effects": EDGE}
# What matplotlib calls the parts of a box, and the quantities that they show.
PARTS = {"whislo": "q01", "q1": "q25", "med": "median", "q3": "q75", "whishi": "q99", "mean": "mean"}
BOX = (*PARTS.values(), "max")
PREFERRED = ("fpq", "lsq")  # of the quantized runs, the first there is


def layer_rows(records: pd.DataFrame) -> pd.DataFrame:
    """The rows of one layer that hold numbers by channel, bin or sample, at each run's last measured epoch."""
    rows = records[(records["layer"] != "all") & records["samples"].notna()]
    return last_epochs(rows).reset_index(drop=True)


def chosen_runs(records: pd.DataFrame, run: str | None = None) -> pd.DataFrame:
    """The rows of the float run and of one quantized run, which comes last, chosen as `figure3` says."""
    rows = layer_rows(records)
    rows = rows[rows["quantity"].isin(BOX)]
    if rows.empty:
        raise NothingToDraw("no channel statistics among the records")
    quantized = rows[(rows["bits"] != "FP") & (rows["run"] == run if run is not None else True)]
    if quantized.empty:
        if run is not None:
            raise NothingToDraw(f"no channel statistics of a quantized run '{run}' among the records")
        return rows[rows["run"] == rows["run"].iloc[0]]
    places = {method: i for i, method in enumerate(PREFERRED)}
    first = min(
        quantized[["run", "method", "bits"]].drop_duplicates().itertuples(index=False),
        key=lambda one: (
            places.get(str(one.method), len(places)),
            [-n for n in bits_rank(str(one.bits))],
            str(one.run),
        ),
    )
    ours = quantized[quantized["run"] == first.run]
    alike = rows["bits"].eq("FP")
    for column in ("model", "data", "layer"):
        alike &= rows[column] == ours[column].iloc[0]
    theirs = rows[alike]
    # Beside it, and of its training seed, if there is one; else whichever float run there is.
    for near in (_folder, lambda rows: rows["train_seed"]):
        alike = near(theirs) == near(ours).iloc[0]
        theirs = theirs[alike] if alike.any() else theirs
    return pd.concat([theirs[theirs["run"] == theirs["run"].min()], ours])


def _folder(rows: pd.DataFrame) -> pd.Series:
    return rows["run"].map(lambda run: str(run).rpartition("/")[0])


@style()
def figure3(records: pd.DataFrame, run: str | None = None) -> Figure:
    """A box for each channel of one layer, of the float run and a quantized run, on one scale; then the means' shift.

    Boxes hold the middle half of the values and whiskers the middle 98 %; a dot is the largest value, and the orange
    line the *mean*, as in the paper, not the median.  At most 32 channels, the first ones, counted from 1.  The last
    panel is the quantized run's mean less the float one's, with its 95 % interval over the samples.

    Args:
        records: of the probe `features`; columns as in `records.COLUMNS`.
        run: the quantized run; None for the one of FPQ, or else LSQ, or else any, with the lowest bits.

    Raises:
        NothingToDraw: if there is nothing to draw, or no such run.
    """
    rows = chosen_runs(records, run)
    groups = [group for _, group in rows.groupby("run", sort=False)]
    looks = Looks(families(records))
    both = len(groups) == 2
    figure, places = panels(len(groups) + both, 1.6, across=(1, 1), sharex=True)
    highest = max(max(_column(group, "max")) for group in groups)
    lowest = min(min(_column(group, "q01")) for group in groups)
    for axes, group in zip(places, groups, strict=False):
        _draw_boxes(axes, group, looks.colour(group.iloc[0]))
        axes.set_ylim(lowest - 0.03 * (highest - lowest), highest + 0.06 * (highest - lowest))
        first = group.iloc[0]
        head(axes, at_epoch(kind(first), first["epoch"]))
        axes.set_ylabel("Activation")
    if both:
        last = groups[1].iloc[0]
        _draw_shifts(places[2], records, groups, looks.colour(last))
        head(places[2], f"Mean of {kind(last)}, less that of {kind(groups[0].iloc[0])}")
        places[2].set_ylabel("Shift of the mean")
    places[-1].set_xlabel(f"Channel of {rows['layer'].iloc[0]}")
    outer(places)
    box = Patch(facecolor="0.8", edgecolor="0.4", linewidth=0.8, label="middle half")
    mean = Line2D([], [], **LINE, label="mean")
    most = Line2D([], [], color="0.4", linestyle="", marker=".", markersize=4, label="largest value")
    legend(figure, [box, mean, most])
    return figure


def _column(rows: pd.DataFrame, quantity: str) -> np.ndarray:
    """A number for each channel that is drawn; none if they were not measured."""
    found = rows.loc[rows["quantity"] == quantity, "samples"]
    return np.asarray(found.iloc[0][:MOST] if len(found) else [], dtype=float)


def _draw_boxes(axes: Axes, rows: pd.DataFrame, color: str) -> None:
    columns = {name: _column(rows, name) for name in BOX}
    n = len(columns["mean"])
    boxes = [{part: columns[name][i] for part, name in PARTS.items()} for i in range(n)]
    channels = np.arange(1, n + 1)
    thin: dict[str, Any] = {"color": color, "linewidth": 0.7}
    axes.bxp(
        boxes,
        positions=channels,
        widths=0.7,
        showfliers=False,
        showmeans=True,
        meanline=True,
        patch_artist=True,
        boxprops={"facecolor": color, "alpha": 0.35, "edgecolor": color, "linewidth": 0.7},
        whiskerprops=thin,
        capprops=thin,
        medianprops={"linewidth": 0},  # at zero for most channels of a ReLU, and easily taken for the mean
        meanprops=LINE,
    )
    axes.plot(channels, columns["max"], ".", color=color, markersize=3, label="largest value")
    ticks = [1, *range(4, n + 1, 4)] if n > 8 else list(range(1, n + 1))
    axes.set_xticks(ticks, [str(i) for i in ticks])
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw_shifts(axes: Axes, records: pd.DataFrame, groups: list[pd.DataFrame], color: str) -> None:
    """`records`: for the means' errors, which `groups` leave out.

    The errors of both means are taken as independent.  On the same samples they are not, and the interval is the wider.
    """
    theirs, ours = (_column(group, "mean") for group in groups)
    shift, channels = ours - theirs, np.arange(1, len(ours) + 1)
    rows = layer_rows(records)
    sems = [_column(rows[rows["run"] == group["run"].iloc[0]], "mean_sem") for group in groups]
    half = Z95 * np.hypot(*sems) if len(sems[0]) == len(sems[1]) == len(shift) else None
    axes.axhline(0, color="0.45", linewidth=0.8)
    axes.errorbar(channels, shift, half, fmt="o", color=color, markersize=2.6, elinewidth=0.8, capsize=1.5)
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def caption3(records: pd.DataFrame, run: str | None = None) -> str:
    """What a reader must know beside the figure: layer, runs, data, what boxes and lines are."""
    rows = chosen_runs(records, run)
    first = rows.iloc[0]
    runs = ", ".join(
        f"{one['run']} ({kind(one)}, epoch {one['epoch']}, training seed {one['train_seed']}, mean of all channels "
        f"{one['value']:#.3g} ± {one['ci95']:.1g})"
        for _, one in rows[rows["quantity"] == "mean"].iterrows()
    )
    n_channels = len(first["samples"])
    shown = f"channels 1-{min(MOST, n_channels)} of {n_channels}"
    kept = rows.loc[rows["quantity"] == "median", "n_data"].min()
    both, errors = "", "±: 95 % interval over the samples."
    if rows["run"].nunique() > 1:
        both = "; the same for both"
        errors = (
            "± and bars: 95 % interval over the samples; that of a shift takes the two means' errors as independent, "
            "which on the same samples is too wide."
        )
    return (
        f"Range of the output of {first['layer']} by channel ({shown}; {subject(first)}): {runs}. "
        "Boxes: middle half of the values over samples and places; whiskers: middle 98 %; dots: largest value; orange "
        f"line: mean, not the median. Raw output, before the next layer's quantizer; {rows['n_data'].max()} "
        f"{samples_of(rows)} without augmentation (seed {first['seed']}{both}), quantiles from {kept} of them. {errors}"
    )
