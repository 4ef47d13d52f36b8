"""Figure 3 of the paper: the range of every channel of one layer, float above and quantized below."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.methods import method_label
from fpq_analysis.plots.style import at_epoch, colour, style
from fpq_analysis.records.queries import last_epochs, samples_of

MOST = 32  # channels, as in the paper
MEAN = "#E69F00"  # the paper's orange line
# What matplotlib calls the parts of a box, and the quantities that they show.
PARTS = {"whislo": "q01", "q1": "q25", "med": "median", "q3": "q75", "whishi": "q99", "mean": "mean"}
BOX = (*PARTS.values(), "max")
PREFERRED = ("fpq", "lsq")  # of the quantized runs, the first there is


def layer_rows(records: pd.DataFrame) -> pd.DataFrame:
    """The rows of one layer that hold numbers by channel, bin or sample, at each run's last measured epoch."""
    rows = records[(records["layer"] != "all") & records["samples"].notna()]
    return last_epochs(rows).reset_index(drop=True)


def bits_of(bits: str) -> tuple[int, ...]:
    """`W2A4` as (2, 4); to sort by."""
    return tuple(map(int, re.findall(r"\d+", bits)))


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
        key=lambda one: (places.get(str(one.method), len(places)), bits_of(str(one.bits)), str(one.run)),
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
    """A box for each channel of one layer, of the float run above and of a quantized run below, on one scale.

    Boxes hold the middle half of the values and whiskers the middle 98 %; a dot is the largest value, and the orange
    line the *mean*, as in the paper, not the median.  At most 32 channels, the first ones, counted from 1.

    Args:
        records: of the probe `features`; columns as in `records.COLUMNS`.
        run: the quantized run; None for the one of FPQ, or else LSQ, or else any, with the lowest bits.

    Raises:
        NothingToDraw: if there is nothing to draw, or no such run.
    """
    rows = chosen_runs(records, run)
    groups = [group for _, group in rows.groupby("run", sort=False)]
    methods = sorted(records["method"].unique())
    figure = Figure(figsize=(7.2, 2.1 * len(groups) + 0.3), layout="constrained")
    first: Axes | None = None
    for index, group in enumerate(groups):
        axes = figure.add_subplot(len(groups), 1, index + 1, sharex=first, sharey=first)
        first = first or axes
        _draw(axes, group, colour(group["method"].iloc[0], methods))
        axes.tick_params(labelbottom=index == len(groups) - 1)
    axes.set_xlabel(f"Channel of {rows['layer'].iloc[0]}")
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, color: str) -> None:
    by_name = rows.set_index("quantity")["samples"]
    columns = {name: np.asarray(by_name[name][:MOST], dtype=float) for name in BOX}
    n = len(columns["mean"])
    boxes = [{part: columns[name][i] for part, name in PARTS.items()} for i in range(n)]
    channels = np.arange(1, n + 1)
    axes.bxp(
        boxes,
        positions=channels,
        widths=0.7,
        showfliers=False,
        showmeans=True,
        meanline=True,
        patch_artist=True,
        boxprops={"facecolor": color, "alpha": 0.35, "edgecolor": color, "linewidth": 0.8},
        whiskerprops={"color": color, "linewidth": 0.8},
        capprops={"color": color, "linewidth": 0.8},
        medianprops={"linewidth": 0},  # at zero for most channels of a ReLU, and easily taken for the mean
        meanprops={"color": MEAN, "linewidth": 1.8, "linestyle": "-"},
    )
    (dots,) = axes.plot(channels, columns["max"], ".", color=color, markersize=3, label="largest value")
    ticks = [1, *range(4, n + 1, 4)] if n > 8 else list(range(1, n + 1))
    axes.set_xticks(ticks, [str(i) for i in ticks])
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    first = rows.iloc[0]
    axes.set_title(at_epoch(method_label(first["method"], first["bits"]), first["epoch"]), loc="left")
    axes.set_ylabel("Activation")
    overall = rows[rows["quantity"] == "mean"].iloc[0]
    text = f"mean (of all channels: {overall['value']:#.3g} ± {overall['ci95']:.1g})"
    line = Line2D([], [], color=MEAN, linewidth=1.8, label=text)
    axes.legend(handles=[line, dots], loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.1)


def caption3(records: pd.DataFrame, run: str | None = None) -> str:
    """What a reader must know beside the figure: layer, runs, data, what boxes and lines are."""
    rows = chosen_runs(records, run)
    first = rows.iloc[0]
    runs = ", ".join(
        f"{one.run} ({method_label(str(one.method), str(one.bits))}, epoch {one.epoch}, training seed {one.train_seed})"
        for one in rows.drop_duplicates("run").itertuples(index=False)
    )
    n_channels = len(first["samples"])
    shown = f"channels 1-{min(MOST, n_channels)} of {n_channels}"
    kept = rows.loc[rows["quantity"] == "median", "n_data"].min()
    return (
        f"Range of the output of {first['layer']} by channel ({shown}; {first['model']}, {first['dataset']}): {runs}. "
        "Boxes: middle half of the values over samples and places; whiskers: middle 98 %; dots: largest value; orange "
        f"line: mean, not the median. Raw output, before the next layer's quantizer; {rows['n_data'].max()} "
        f"{samples_of(rows)} without augmentation (seed {first['seed']}; the same for both), quantiles from {kept} of "
        "them. ±: 95 % interval over the samples."
    )
