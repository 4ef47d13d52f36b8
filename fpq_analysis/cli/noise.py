"""`fpq-analyze noise`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.cli.app import new_table, print_table, tell
from fpq_analysis.cli.measuring import Settings, measure_and_show, measuring_command
from fpq_analysis.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@measuring_command(epochs="last")
def noise(
    settings: Settings,
    sizes: Annotated[str, typer.Option(help="Widths of the noise in steps, with commas; 1 is added.")] = (
        "0.125,0.25,0.5,1,2,4"
    ),
    n_draws: Annotated[int, typer.Option(help="Pairs of opposite noise for each image.")] = 8,
) -> None:
    """Loss under FPQ's noise in the features, against what the trace of the Hessian predicts to second order.

    At every quantized run's last epoch, with noise in all convolutions at once and in each alone.

    [bold]Examples[/bold]

      fpq-analyze noise --ckpt-dir checkpoints/

      fpq-analyze noise --ckpt-dir checkpoints/fpq --sizes 0.01,0.1,1 --n-draws 32
    """
    from fpq_analysis.probes import NoiseResponse

    try:
        widths = tuple(float(size) for size in sizes.split(","))
    except ValueError:
        raise UserError(f"'{sizes}' are no sizes of noise. Write numbers with commas: 0.5,1,2.") from None
    measure_and_show([NoiseResponse(widths, n_draws)], settings, {"noise": print_responses})


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
        "the measured increase is relative to that, ± 95 % over the images: with logits linear in the noise; with "
        "rounding residues held (straight-through); in the real network."
    )
    tell(textwrap.fill(say_what, width=80))
    tell("")
    for run, group in rows.groupby("run", sort=False):
        one = frame[(frame["run"] == run) & (frame["epoch"] == group["epoch"].iloc[0])]
        tell(textwrap.fill(summary(str(run), one), width=80, subsequent_indent="  "))


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
