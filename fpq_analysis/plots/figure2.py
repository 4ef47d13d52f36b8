"""Figure 2 of the paper: gradient norm against the epoch, with noise in the features and in the weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.methods import BASELINE, METHODS
from fpq_analysis.plots.axes import band, draw_curve, epoch_axis, head, kinds, legend, outer, panels, value_axis
from fpq_analysis.plots.names import subject, titles
from fpq_analysis.plots.style import style
from fpq_analysis.records.queries import distinct, mean_loss, norms, ordered, samples_of, trained_in_noise
from fpq_analysis.records.seeds import Curve, curve, families, interval_words

# In the colours of the methods that are trained in such noise.
LOOKS: dict[str, dict[str, Any]] = {
    "features": {"color": METHODS["noise-features"].colour, "marker": "o", "label": "noise in the features"},
    "weights": {"color": METHODS["noise-weights"].colour, "marker": "s", "label": "noise in the weights"},
    "clean": {"color": "0.45", "linestyle": ":", "linewidth": 1.0, "marker": "", "label": "no noise"},
}
Lines = list[tuple[str, Curve]]  # kind of noise, and the norm in it


@style()
def figure2(records: pd.DataFrame, *, quantity: str = "grad_norm_minibatch") -> Figure:
    """Gradient norm against the epoch, with noise of one quantization step.

    As in the paper, if there are runs trained with noise in the features or the weights (methods `noise-features`,
    `noise-weights`): two curves, each with the noise it was trained with, a panel for each network, data set and bits.
    Otherwise the LSQ runs (without any, every quantized run), a panel for those that differ by their seed alone, in
    both kinds of noise, and dotted without.

    The norm drawn is that of minibatches, as an optimizer meets it, not that of the gradient over all data measured
    on: the latter depends on how many they are once it is small, since the noise of sampling them does not vanish with
    it.  All panels have one y axis; it is logarithmic where the norms span more than a factor of ten.

    Args:
        records: of the probe `gradnorm`; columns as in `records.COLUMNS`.
        quantity: `grad_norm_minibatch`, or `grad_norm` for that over all data.

    Raises:
        NothingToDraw: if there is nothing to draw.
    """
    found = list(_panels(norms(records, quantity)))
    if not found:
        raise NothingToDraw(f"no finite {quantity} in noise among the records")
    figure, places = panels(len(found), 2.1, sharex=True, sharey=True)
    everything = [one for _, lines in found for arm, one in lines if arm != "clean"]
    artists = [artist for axes, panel in zip(places, found, strict=True) for artist in _draw(axes, *panel, everything)]
    outer(places)
    legend(figure, artists)
    return figure


def _panels(rows: pd.DataFrame) -> Iterator[tuple[str, Lines]]:
    """(title, curves)."""
    trained = trained_in_noise(rows)
    if not trained.empty:
        for (_, _, bits), panel in ordered(trained).groupby(["model", "dataset", "bits"], sort=False):
            yield f"{subject(panel.iloc[0])}, {bits}", _lines(panel)
        return
    rows = _with_noise(rows)
    for text, panel in kinds(rows, ["definition"]):
        yield text, _lines(panel)


def _lines(panel: pd.DataFrame) -> Lines:
    arms = [(arm, panel[panel["arm"] == arm]) for arm in LOOKS]
    return [(arm, curve(family)) for arm, rows in arms if len(rows) for family in families(rows)]


def _with_noise(rows: pd.DataFrame) -> pd.DataFrame:
    """The baseline's runs, or else every run, that has an arm in noise."""
    rows = rows[rows["run"].isin(rows.loc[rows["arm"] != "clean", "run"])]
    return rows[rows["method"] == BASELINE] if (rows["method"] == BASELINE).any() else rows


def _draw(axes: Axes, text: str, lines: Lines, everything: list[Curve]) -> list[Any]:
    """`everything`: of all panels, so that they have one axis."""
    value_axis(axes, everything)
    artists = []
    for arm, one in lines:
        look = {**LOOKS[arm]}
        label = look.pop("label")
        if arm == "clean":  # near that in the features, and of use beside it only
            artists += axes.plot(one.x, one.value, label=label, **look)
        else:
            artists.append(draw_curve(axes, one, look, label))
            if len(one.x) > 1:
                band(axes, one.x, one.low, one.high, look["color"], alpha=0, linewidth=0.5, label="_")
    epoch_axis(axes)
    axes.set_ylabel("Gradient norm")
    head(axes, text)
    return artists


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
    dotted = " The interval of the dotted line is in the records." if trained.empty else ""
    return (
        f"Euclidean norm of the gradient of the {mean_loss(drawn)} with respect to the weights (definition: "
        f"{several('definition')}), mean over {several('estimator')} and {draws} draws of the noise, against the "
        f"epoch: {runs}. Noise: uniform, one quantization step wide, in the input (features) or the quantized weight "
        f"(weights) of every convolution. BatchNorm in eval mode, {several('n_data')} {samples_of(drawn)} without "
        f"augmentation (seed {several('seed')}; the same samples and noise for every line). Data: "
        f"{titles(drawn, 'dataset')}; network: {titles(drawn, 'model')}; {several('bits')}; training seed "
        f"{several('train_seed')}.{dotted} " + interval_words(drawn, "minibatches and draws")
    )
