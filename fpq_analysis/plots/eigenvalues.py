"""The extreme eigenvalues of the Hessian against the epoch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import draw_curve, draw_level, epoch_axis, head, kinds, legend, outer, panels, value_axis
from fpq_analysis.plots.names import Looks, at_epoch, titles
from fpq_analysis.plots.style import style
from fpq_analysis.records.queries import distinct, eigenvalues, mean_loss, samples_of
from fpq_analysis.records.seeds import curve, families, interval_words


@style()
def eigenvalue_figure(records: pd.DataFrame) -> Figure:
    """Eigenvalues against the epoch, the extreme one in full colour, the others fainter; all panels have one y axis.

    A panel for the runs that differ by their seed alone (float ones are a horizontal line at their last epoch's where
    there are quantized ones), see `records.seeds.Curve`.  One run has residuals instead of
    error bars: each eigenvalue is within its residual, a thousandth of it by default, of one for these data.

    From records of the probe `hessian_eigs`; raises `NothingToDraw` if they hold none.
    """
    rows = eigenvalues(records)
    if rows.empty:
        raise NothingToDraw("no finite eigenvalue among the records")
    looks = Looks(families(rows))
    float_runs = rows["bits"] == "FP"
    levels = rows[float_runs & (rows["rank"] == 1)] if not float_runs.all() else rows[:0]
    found = [
        (text, [curve(line) for _, line in panel.groupby("rank", sort=True)])
        for text, panel in kinds(rows if levels.empty else rows[~float_runs])
    ]
    held = [(text, curve(line).last()) for text, line in kinds(levels)]
    figure, places = panels(len(found), 1.9, sharex=True, sharey=True)
    everything = [one for _, lines in found for one in lines] + [one for _, one in held]
    artists: list[Any] = []
    for axes, (title, lines) in zip(places, found, strict=True):
        value_axis(axes, everything)
        for text, one in held:
            artists.append(draw_level(axes, one, looks, at_epoch(text, one.x[0])))
        for rank, one in reversed(list(enumerate(lines))):
            mark = looks.line(one.first)
            if rank:
                fainter = 1 - 0.65 * rank / (len(lines) - 1)
                axes.plot(one.x, one.value, **mark, alpha=fainter, label=f"{rank + 1}", markersize=2.5)
            else:
                draw_curve(axes, one, mark, "1")
        if axes.get_yscale() == "linear":
            axes.axhline(0, color="0.6", linewidth=0.6, label="_")
        epoch_axis(axes)
        axes.set_ylabel(f"{len(lines)} extreme eigenvalues" if len(lines) > 1 else "Extreme eigenvalue")
        head(axes, title)
    outer(places)
    legend(figure, artists)
    return figure


def eigenvalue_caption(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    rows = eigenvalues(records)
    several = partial(distinct, rows)
    return (
        f"Extreme eigenvalues of the Hessian of the {mean_loss(rows)} against the epoch (definition: "
        f"{several('definition')}; {several('estimator')}), BatchNorm in eval mode, on {several('n_data')} "
        f"{samples_of(rows)} without augmentation (seed {several('seed')}). Data: "
        f"{titles(rows, 'dataset')}; network: {titles(rows, 'model')}; training seed {several('train_seed')}. Full "
        "colour: the extreme one. Relative residuals are stored with the values; there is no error over the data. "
        + interval_words(rows[rows["rank"] == 1], "")
    ).strip()
