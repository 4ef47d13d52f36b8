"""`fpq-analyze oscillation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.cli.app import new_table, print_table, tell
from fpq_analysis.cli.measuring import Settings, measure_and_show, measuring_command, some_epochs

if TYPE_CHECKING:
    import pandas as pd


# The images play no part; two are the fewest that a measurement takes.
@measuring_command(fixed={"n_data": 2, "seed": 0})
def oscillation(
    settings: Settings,
    eps: Annotated[float, typer.Option(help="What counts as near a threshold, in steps.")] = 0.1,
) -> None:
    """Weights near a rounding threshold, and weights on another level than at the checkpoint before.

    Every quantized weight is counted; no image is looked at.

    [bold]Example[/bold]

      fpq-analyze oscillation --ckpt-dir checkpoints/
    """
    from fpq_analysis.probes import Oscillation

    measure_and_show([Oscillation(eps)], settings, {"oscillation": print_shares})


def print_shares(frame: pd.DataFrame) -> None:
    """Whole-network shares, some epochs of every run."""
    rows = some_epochs(frame[frame["layer"] == "all"])
    if rows.empty:
        return
    heads = {
        "near": "Near",
        "flipped": "Flipped",
        "flipped_step": "by the step",
        "flipped_near": "of them near",
    }
    table = new_table({"Run": "left", "Epoch": "right", **dict.fromkeys(heads.values(), "right")})
    for run, group in rows.groupby("run", sort=False):
        for epoch, one in group.groupby("epoch"):
            values = one.drop_duplicates("quantity", keep="last").set_index("quantity")["value"]
            cells = [f"{100 * values[quantity]:.2f} %" if quantity in values else "" for quantity in heads]
            table.add_row(str(run), str(epoch), *cells)
        table.add_section()
    print_table(table)
    eps = frame.loc[frame["quantity"] == "eps", "value"].iloc[-1]
    tell(f"Near: less than {eps:g} steps from a rounding threshold ({200 * eps:g} % if spread evenly).")
    tell("Flipped: another whole number than at the checkpoint before.")
    tell("By the step: it would not be another, had its step size stayed.")
