"""The extreme eigenvalues of the Hessian against the epoch."""

from __future__ import annotations

from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.style import epoch_axis, line_style, panels, style
from fpq_analysis.records.queries import distinct, eigenvalues, mean_loss, samples_of


@style()
def eigenvalue_figure(records: pd.DataFrame) -> Figure:
    """Eigenvalues against the epoch, a panel a run: the extreme one in full colour, the others fainter.

    They have residuals instead of error bars: each is within its residual, a thousandth of it by default, of an
    eigenvalue for these data.

    From records of the probe `hessian_eigs`; raises `NothingToDraw` if they hold none.
    """
    rows = eigenvalues(records)
    if rows.empty:
        raise NothingToDraw("no finite eigenvalue among the records")
    methods = sorted(rows["method"].unique())
    figure, parts = panels(rows, (3.2, 2.6), shared=False)
    for axes, panel in parts:
        first = panel.iloc[0]
        most = int(panel["rank"].max())
        for rank in range(1, most + 1):
            line = panel[panel["rank"] == rank].sort_values("epoch")
            axes.plot(
                line["epoch"],
                line["value"],
                **line_style(first["method"], first["bits"], methods),
                alpha=1 - 0.7 * (rank - 1) / max(1, most - 1),
                label=f"{rank}",
            )
        axes.axhline(0, color="0.6", linewidth=0.6)
        epoch_axis(axes)
        axes.set_ylabel(f"{most} extreme eigenvalues" if most > 1 else "Extreme eigenvalue")
    return figure


def eigenvalue_caption(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    rows = eigenvalues(records)
    several = partial(distinct, rows)
    return (
        f"Extreme eigenvalues of the Hessian of the {mean_loss(rows)} against the epoch (definition: "
        f"{several('definition')}; {several('estimator')}), BatchNorm in eval mode, on {several('n_data')} "
        f"{samples_of(rows)} without augmentation (seed {several('seed')}). Relative residuals are stored with the "
        "values; there is no error over the data."
    )
