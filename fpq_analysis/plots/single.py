"""The figure of one measurement of one network, which belongs to no run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import panels
from fpq_analysis.plots.figures import FIGURES
from fpq_analysis.plots.names import SPARE_COLOURS
from fpq_analysis.plots.style import style
from fpq_analysis.records.queries import half_widths

NETWORK = "this network"


def single_figure(records: pd.DataFrame) -> Figure:
    """The first figure of the records' probe that shows one network alone; else its numbers layer by layer.

    Args:
        records: of one measurement, as `Result.frame` gives them.

    Raises:
        NothingToDraw: if there is nothing to draw.
    """
    name = records["run"].iloc[0] or NETWORK
    data = f"{records['n_data'].iloc[-1]} samples"
    about = {"method": name, "bits": "FP", "model": name, "dataset": data, "data": "", "train_seed": "", "epoch": ""}
    for drawing in FIGURES.values():
        if drawing.picture.single and drawing.probe == records["probe"].iloc[0]:
            blank = {column: records[column].fillna("") for column in ("definition", "estimator")}
            return drawing.draw(records.assign(run=name, **about, **blank))
    return layer_figure(records)


@style()
def layer_figure(records: pd.DataFrame) -> Figure:
    """The records' last quantity in every layer; without layers, all quantities of its kind (`eigenvalue_1`, ...)."""
    last = str(records["quantity"].iloc[-1])
    rows = records[(records["quantity"] == last) & (records["layer"] != "all")]
    names = rows["layer"]
    if rows.empty:
        kind = last.rstrip("0123456789")
        rows = records[records["quantity"].str.rstrip("0123456789") == kind]
        names = rows["quantity"].map(_words)
    rows = rows[rows["value"].notna()]
    if rows.empty:
        raise NothingToDraw(f"no finite {last} among the records")
    half = half_widths(rows)
    places = np.arange(len(rows))
    figure, (axes,) = panels(1, 0.3 + 0.14 * max(6, len(rows)))
    axes.barh(places, rows["value"], xerr=half, color=SPARE_COLOURS[0], alpha=0.85, error_kw={"linewidth": 1.0})
    axes.set_yticks(places, names[rows.index].tolist(), fontsize=7)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(_words(last if len(rows) == 1 or "all" not in set(rows["layer"]) else last.rstrip("_0123456789")))
    return figure


def _words(quantity: str) -> str:
    return quantity[:1].upper() + quantity[1:].replace("_", " ")
