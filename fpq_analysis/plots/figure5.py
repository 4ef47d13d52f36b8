"""Figure 5 of the paper: the trace of the Hessian against the epoch, one line a run."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fpq_analysis.plots.style import LINES, MARKERS, colour, label, style


def totals(records: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold a whole network's trace and are finite."""
    whole = records[(records["layer"] == "all") & (records["quantity"] == "trace")]
    return whole[whole["value"].notna()]


def figure5(records: pd.DataFrame, *, include_fp: bool = True) -> Figure:
    """Trace against epoch, a panel for each network and data set, a line for each run.

    The band is the 95 % interval over the data (1.96 standard errors; over the probes where the error over the data is
    unknown).  All lines of a panel see the same images, so that the difference of two lines is surer than their
    bands suggest.

    Args:
        records: of the probe `hessian_trace`; columns as in `records.COLUMNS`.
        include_fp: draw the float runs too.

    Raises:
        ValueError: if there is nothing to draw.
    """
    rows = totals(records)
    if not include_fp:
        rows = rows[rows["method"] != "fp"]
    if rows.empty:
        raise ValueError("no finite trace among the records")
    panels = list(rows.groupby(["model", "dataset"], sort=True))
    with style():
        figure = Figure(figsize=(5.2 * len(panels), 3.2), layout="constrained")
        for index, ((model, dataset), panel) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            methods = sorted(panel["method"].unique())
            ends = []
            for (run, method, bits, definition, estimator), line in panel.groupby(
                ["run", "method", "bits", "definition", "estimator"], sort=True
            ):
                line = line.sort_values("epoch")
                error = 1.96 * line["sem_data"].fillna(line["sem"])
                tint = colour(method, methods)
                text = label(method, bits)
                if panel["definition"].nunique() > 1:
                    text += f", {definition}"
                if panel["estimator"].nunique() > 1:
                    text += f", {estimator}"
                if panel[(panel["method"] == method) & (panel["bits"] == bits)]["run"].nunique() > 1:
                    text += f" ({run})"
                (drawn,) = axes.plot(
                    line["epoch"], line["value"], LINES.get(bits, "-"), marker=MARKERS.get(bits, "o"), color=tint, label=text
                )
                axes.fill_between(
                    line["epoch"], line["value"] - error, line["value"] + error, color=tint, alpha=0.15, linewidth=0
                )
                ends.append((line["value"].iloc[-1], drawn))
            axes.set_xlabel("Epoch (0: before training)")
            axes.set_ylabel("Trace of the Hessian")
            axes.set_title(f"{model}, {dataset}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylim(bottom=min(0.0, float(panel["value"].min()) * 1.1))
            # The legend in the order of the lines' right ends, so that it can be read without matching colours.
            handles = [line for _, line in sorted(ends, key=lambda end: -end[0])]
            axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def caption5(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure: definition, method, data, seeds, sample size."""
    rows = totals(records)

    def several(column: str) -> str:
        return ", ".join(str(value) for value in sorted(rows[column].unique()))

    return (
        f"Trace of the Hessian of the mean cross-entropy against the epoch (definition: {several('definition')}; "
        f"estimator: {several('estimator')}), BatchNorm in eval mode, on {several('n_data')} training images without "
        f"augmentation (sample seed {several('seed')}; the same images for every line). Data: {several('dataset')}; "
        f"network: {several('model')}; training seed {several('train_seed')}. Bands: 95 % interval over the images, "
        "not over training runs."
    )
