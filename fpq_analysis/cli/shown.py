"""How the commands print the records of measurements that a plain table of quantities would not do justice to."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from fpq_analysis.cli.app import echo, new_table, print_table
from fpq_analysis.cli.measuring import print_quantities, some_epochs

if TYPE_CHECKING:
    import pandas as pd

ARMS = {"clean": "Clean", "features": "Features", "weights": "Weights"}


def print_variances(frame: pd.DataFrame) -> None:
    """Variances and flips at one size of the noise."""
    from fpq_analysis.plots.figure1 import SD
    from fpq_analysis.records.queries import nearest, variances

    rows = variances(frame)
    if rows.empty:
        return
    at = nearest(rows, SD)
    heads = {"logit_variance": "Logits", "probability_variance": "Probabilities", "flipped": "Flipped"}
    print_quantities(frame, {f"{quantity}@{at:g}": head for quantity, head in heads.items()})
    text = (
        f"Variance under noise of sd {at:g} in the normalised input, mean over classes and samples; flipped: share of "
        "predictions that change. ± 95 %: over the samples, draws of the noise included."
    )
    echo(textwrap.fill(text, width=80))


def print_norms(frame: pd.DataFrame) -> None:
    """Norms over minibatches, clean and in noise, and that over all data."""
    if frame.empty:
        return
    minibatch = "grad_norm_minibatch"
    rows = frame[(frame["layer"] == "all") & frame["quantity"].str.startswith(f"{minibatch}@")]
    headings = {f"{minibatch}@{arm}": head for arm, head in ARMS.items()} if len(rows) else {}
    print_quantities(frame, {**headings, "grad_norm@clean": "All data"})
    if headings:
        text = (
            f"Clean, features, weights: mean norm over {rows['estimator'].iloc[0]}, and in noise of a rounding step. "
        )
    else:
        text = "The data do not fill a minibatch; a smaller --batch-size gives minibatch norms. "
    text += "All data: norm of their mean gradient, clean. ± 95 %: over minibatches or samples, and draws of the noise."
    echo(textwrap.fill(text, width=80))


def print_features(frame: pd.DataFrame) -> None:
    """Means over the channels, a row a checkpoint; of long runs the first, the last and some between."""
    from fpq_analysis.text import number

    rows = some_epochs(frame[frame["layer"] != "all"])
    if rows.empty:
        return
    heads = ("Mean", "± 95 %", "SD", "99 %", "Max", "Rounded")
    table = new_table({"Run": "left", "Epoch": "right", **dict.fromkeys(heads, "right")})
    for run, group in rows.groupby("run", sort=False):
        for epoch, one in group.groupby("epoch"):
            by_name = one.drop_duplicates("quantity", keep="last").set_index("quantity")
            values = {str(name): number(float(value), 4) for name, value in by_name["value"].items()}
            half = number(float(by_name["ci95"]["mean"]), 2)
            numbers = (values["mean"], half, values["sd"], values["q99"], values["max"])
            table.add_row(str(run), str(epoch), *numbers, values.get("quantized_mean", ""))
        table.add_section()
    layers = ", ".join(rows["layer"].unique())
    echo(f"Output of {layers}, means over its channels:")
    print_table(table)
    echo("± 95 %: of the mean, over the samples.")
    echo("Rounded: the mean behind the quantizer of the layer that comes next.")


def print_responses(frame: pd.DataFrame) -> None:
    """Predicted and measured increases at every size, at each run's last epoch; and the layers that cost most."""
    from fpq_analysis.records.queries import responses
    from fpq_analysis.text import fraction, number

    rows = responses(frame)
    if rows.empty:
        return
    heads = {"linear": "Linear", "surrogate": "Straight-thr.", "real": "Real"}
    table = new_table(
        {
            "Run": "left",
            "Epoch": "right",
            "Steps": "right",
            "Predicted": "right",
            **dict.fromkeys(heads.values(), "right"),
        }
    )
    for (run, epoch), group in rows.groupby(["run", "epoch"], sort=False):
        here = frame[(frame["run"] == run) & (frame["epoch"] == epoch) & (frame["layer"] == "all")]
        ratios = here.set_index("quantity")[["value", "ci95"]]
        for size, one in group[group["kind"] == "predicted"].groupby("size"):
            cells = [number(float(one["value"].iloc[0]), 3)]
            for kind in heads:
                name = f"ratio_{kind}_{size:g}"
                if name in ratios.index:
                    cells.append(f"{ratios['value'][name]:.2f} ± {number(float(ratios['ci95'][name]), 2)}")
                else:
                    cells.append("")
            table.add_row(str(run), str(epoch), fraction(float(one["size"].iloc[0])), *cells)
        table.add_section()
    print_table(table)
    say_what = (
        "Predicted: increase of the loss by noise of so many steps at the input of every convolution. Behind it, what "
        "the measured increase is relative to that, ± 95 % over the samples: with logits linear in the noise; with "
        "rounding residues fixed (straight-through); in the real network."
    )
    echo(textwrap.fill(say_what, width=80))
    echo("")
    for run, group in rows.groupby("run", sort=False):
        one = frame[(frame["run"] == run) & (frame["epoch"] == group["epoch"].iloc[0])]
        echo(textwrap.fill(summary(str(run), one), width=80, subsequent_indent="  "))


def summary(run: str, rows: pd.DataFrame) -> str:
    """One checkpoint's verdicts and its costliest layer, in words."""
    from fpq_analysis.text import fraction, number

    whole = rows[rows["layer"] == "all"].set_index("quantity")["value"]

    def up_to(quantity: str) -> str:
        return f"up to {fraction(whole[quantity])}" if whole[quantity] > 0 else "at no size"

    layers = rows[(rows["layer"] != "all") & (rows["quantity"] == "predicted_1")].set_index("layer")["value"]
    text = (
        f"{run}: the prediction is less than 10 % off {up_to('within_10_surrogate')} straight-through and "
        f"{up_to('within_10_real')} in the real network; within the error {up_to('holds_surrogate')} and "
        f"{up_to('holds_real')}."
    )
    if layers.sum() > 0:
        share = 100 * layers.max() / layers.sum()
        text += f" Costliest layer: {layers.idxmax()}, {number(share, 2)} % of the prediction."
    return text


def print_shares(frame: pd.DataFrame) -> None:
    """Whole-network shares, some epochs of every run."""
    rows = some_epochs(frame[frame["layer"] == "all"])
    if rows.empty:
        return
    heads = {
        "near": "Near",
        "flipped": "Flipped",
        "previous": "since",
        "flipped_step": "by the step",
        "flipped_near": "of them near",
    }
    table = new_table({"Run": "left", "Epoch": "right", **dict.fromkeys(heads.values(), "right")})
    for run, group in rows.groupby("run", sort=False):
        for epoch, one in group.groupby("epoch"):
            values = one.drop_duplicates("quantity", keep="last").set_index("quantity")["value"]
            form = {"previous": "epoch {:.0f}"}
            cells = [form.get(head, "{:.2%}").format(values[head]) if head in values else "" for head in heads]
            table.add_row(str(run), str(epoch), *cells)
        table.add_section()
    print_table(table)
    eps = frame.loc[frame["quantity"] == "eps", "value"].iloc[-1]
    echo(f"Near: less than {eps:g} steps from a rounding threshold ({200 * eps:g} % if spread evenly).")
    echo("Flipped: another whole number than at the checkpoint before.")
    echo("By the step: it would not be another, had its step size stayed.")
