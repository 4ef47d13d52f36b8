"""Oscillating weights against the epoch."""

from __future__ import annotations

from functools import partial

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import draw_curve, epoch_axis, head, legend, panels, subjects, value_axis
from fpq_analysis.plots.names import Looks, family_label, titles
from fpq_analysis.plots.style import style
from fpq_analysis.records.queries import distinct
from fpq_analysis.records.seeds import curve, families, interval_words
from fpq_analysis.text import listed

PANELS = {"near": "near a rounding threshold", "flipped": "on another level than before"}


def shares(records: pd.DataFrame) -> pd.DataFrame:
    """The whole-network shares that are drawn."""
    rows = records[(records["layer"] == "all") & records["quantity"].isin(list(PANELS))]
    return rows[rows["value"].notna()]


def comparable(records: pd.DataFrame) -> pd.DataFrame:
    """As `shares`, with the epochs since the checkpoint before in a column `span` (NaN in older records).

    The share of flips is NaN where that is another number than is usual in the run: flips across a missing checkpoint
    are those of several epochs, and no number to be seen beside the others.
    """
    before = records.loc[records["quantity"] == "previous", ["run", "epoch", "value"]]
    before = before.drop_duplicates(["run", "epoch"], keep="last").rename(columns={"value": "previous"})
    rows = shares(records).merge(before, how="left", on=["run", "epoch"])
    rows["span"] = rows["epoch"] - rows["previous"].astype(float)
    usual = rows.groupby("run")["span"].transform(lambda span: span.mode().min())
    across = (rows["quantity"] == "flipped") & rows["span"].notna() & (rows["span"] != usual)
    return rows.assign(value=rows["value"].mask(across))


@style()
def oscillation_figure(records: pd.DataFrame) -> Figure:
    """Share of the weights near a threshold, and of those that flipped, against the epoch.

    A line for the runs that differ by their seed alone, see `records.seeds.Curve`.  A row of two panels for each
    network and data set.  The grey line is the share near a threshold if weights lay anywhere in their step with
    equal chance.  Where a checkpoint is missing, the line of flips is broken.

    From records of the probe `oscillation`; raises `NothingToDraw` if they hold none.
    """
    rows = comparable(records)
    if rows.empty:
        raise NothingToDraw("no oscillation among the records")
    eps = float(records.loc[records["quantity"] == "eps", "value"].iloc[-1])
    found = subjects(rows)
    figure, places = panels(len(PANELS) * len(found), 2.2, across=(1, 2))
    artists = []
    for i, (title, part, widths) in enumerate(found):
        looks = Looks(families(part))
        for axes, (quantity, text) in zip(places[len(PANELS) * i :], PANELS.items(), strict=False):
            shown = part[part["quantity"] == quantity]
            lines = [(family_label(one, part), curve(one)) for one in families(shown)]
            value_axis(axes, [one for _, one in lines])
            for label, one in lines:
                if one.first["bits"] not in widths:
                    continue
                mark = looks.line(one.first)
                artists.append(draw_curve(axes, one, mark, label))
            if quantity == "near":
                even = axes.axhline(2 * eps, color="0.45", linewidth=0.8, linestyle=":", label="if spread evenly")
                axes.set_ylim(top=max(axes.get_ylim()[1], 2.1 * eps))
            epoch_axis(axes)
            axes.set_ylabel("Share of the weights")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
            head(axes, f"{title}\n{text}")
    legend(figure, [*artists, even])
    return figure


def oscillation_caption(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure."""
    rows = comparable(records)
    eps = float(records.loc[records["quantity"] == "eps", "value"].iloc[-1])
    several = partial(distinct, rows)
    flips = rows[rows["quantity"] == "flipped"]
    spans = sorted(set(flips.loc[flips["value"].notna(), "span"].dropna().astype(int)))
    before = f", {listed(spans, 'or')} epochs earlier" if spans and spans != [1] else ""
    broken = " Lines are broken where a checkpoint is missing." if flips["value"].isna().any() else ""
    return (
        f"(a) Share of the quantized weights less than {eps:g} steps from a rounding threshold. (b) Share whose "
        f"whole number differs from that at the checkpoint before{before}, whether the weight moved or its step size."
        f"{broken} All quantized weights are counted, so that one run has no error. Data: {titles(rows, 'dataset')}; "
        f"network: {titles(rows, 'model')}; training seed {several('train_seed')}. " + interval_words(rows, "")
    ).strip()
