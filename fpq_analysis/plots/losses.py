"""Training losses against the epoch, each term in a panel of its own, from the rows that training leaves."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.style import epoch_axis, line_style, log_if_wide, style
from fpq_analysis.records.queries import distinct

# A column of `train.jsonl` to the title of its panel, in this order; other terms follow by their names.
TERMS = {
    "loss_ce": "Cross-entropy",
    "loss_csd": "Distillation of features (CSD)",
    "loss_kd": "Distillation of logits (KD)",
    "loss_alpha": "Penalty on clipping levels",
    "loss": "Loss",
}


def loss_terms(rows: pd.DataFrame) -> list[str]:
    """The terms to be drawn, in order: those that are not zero throughout; of a loss without such terms the loss."""
    on = rows.loc[rows["value"] != 0, "term"].unique()
    found = [name for name in on if name != "loss"] or list(rows["term"].unique())
    return sorted(found, key=lambda name: (list(TERMS).index(name) if name in TERMS else len(TERMS), name))


@style()
def loss_figure(rows: pd.DataFrame) -> Figure:
    """Terms of the training loss, as weighted in it, against the epoch: a panel a term, a line a variant and bits.

    Lines are means over the runs, the training seeds; bands reach from the lowest to the highest of them.  Axes are
    logarithmic where the values span more than a factor of ten.

    Args:
        rows: a row for each run, epoch and term; columns run, variant (the method, as the legend calls it), method,
            model, dataset, bits, epoch, term (its column in `train.jsonl`), value.

    Raises:
        NothingToDraw: if there is nothing to draw.
    """
    if rows.empty:
        raise NothingToDraw("no training loss among the rows")
    terms = loss_terms(rows)
    methods = sorted(rows["method"].unique())
    figure = Figure(figsize=(min(3.2 * len(terms), 9.6) + 1.2, 3.0 * -(-len(terms) // 3)), layout="constrained")
    lines: dict[str, Line2D] = {}
    for index, term in enumerate(terms):
        axes = figure.add_subplot(-(-len(terms) // 3), min(3, len(terms)), index + 1)
        for name, line in _draw(axes, rows[rows["term"] == term], methods).items():
            lines.setdefault(name, line)
        axes.set_title(TERMS.get(term, term.removeprefix("loss_").replace("_", " ").capitalize()))
        axes.set_ylabel("Mean over the epoch" if index == 0 else "")
    figure.legend(list(lines.values()), list(lines), loc="outside right center")
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, methods: list[str]) -> dict[str, Line2D]:
    found: dict[str, Line2D] = {}
    several = rows[["model", "dataset"]].drop_duplicates().shape[0] > 1
    for _, line in rows.groupby(["model", "dataset", "variant", "bits"], sort=False):
        first = line.iloc[0]
        text = first["variant"] if first["bits"] == "FP" else f"{first['variant']} {first['bits']}"
        text += f", {first['model']}, {first['dataset']}" if several else ""
        at = line.groupby("epoch")["value"].agg(["mean", "min", "max"])
        look = line_style(first["method"], first["bits"], methods)
        (found[text],) = axes.plot(at.index, at["mean"], label=text, **look)
        axes.fill_between(at.index, at["min"], at["max"], color=look["color"], alpha=0.15, linewidth=0)
    log_if_wide(axes, rows["value"].min(), rows["value"].max())
    epoch_axis(axes, 6)
    return found


def loss_caption(rows: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    seeds = rows.groupby(["model", "dataset", "variant", "bits"])["run"].nunique().max()
    runs = "Each line is one training run"
    if seeds > 1:
        runs = f"Mean over up to {seeds} training runs, bands from the lowest to the highest of them"
    apart = "Its terms, each as weighted in it, are drawn apart. " if len(loss_terms(rows)) > 1 else ""
    return (
        "Training loss against the epoch: mean over the epoch's batches, as augmented, of the network while it "
        f"learns. {apart}{runs}. Data: {distinct(rows, 'dataset')}; network: {distinct(rows, 'model')}."
    )
