"""Training losses against the epoch, each term in a panel of its own, from the rows that training leaves."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import draw_curve, epoch_axis, head, legend, panels, value_axis
from fpq_analysis.plots.names import Looks, subject, titles
from fpq_analysis.plots.style import style
from fpq_analysis.plots.training import VARIANT, seeds_words, variants
from fpq_analysis.records.queries import ordered

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

    Lines are means over the runs, the training seeds; from three on with a 95 % Student interval over them.  Axes are
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
    looks = Looks(line for _, line in ordered(rows).groupby(VARIANT, sort=False))
    figure, places = panels(len(terms), 2.0)
    artists = []
    for axes, term in zip(places, terms, strict=True):
        artists += _draw(axes, rows[rows["term"] == term], looks)
        axes.set_ylabel("Mean over the epoch")
        head(axes, TERMS.get(term, term.removeprefix("loss_").replace("_", " ").capitalize()))
    legend(figure, artists)
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, looks: Looks) -> list[Any]:
    several = rows[["model", "dataset"]].drop_duplicates().shape[0] > 1
    found = [line for _, part in rows.groupby(["model", "dataset"], sort=True) for line in variants(part)]
    value_axis(axes, [one for _, one in found])
    artists = []
    for text, one in found:
        label = f"{text}, {subject(one.first)}" if several else text
        artists.append(draw_curve(axes, one, looks.line(one.first), label))
    epoch_axis(axes)
    return artists


def loss_caption(rows: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    apart = "Its terms, each as weighted in it, are drawn apart. " if len(loss_terms(rows)) > 1 else ""
    return (
        "Training loss against the epoch: mean over the epoch's batches, as augmented, of the network while it "
        f"learns. {apart}{seeds_words(rows)} Data: {titles(rows, 'dataset')}; network: {titles(rows, 'model')}."
    )
