"""`fpq-analyze features`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.cli.app import new_table, print_table, tell
from fpq_analysis.cli.measuring import Settings, measure_and_show, measuring_command, some_epochs

if TYPE_CHECKING:
    import pandas as pd


@measuring_command()
def features(
    settings: Settings,
    layer: Annotated[str, typer.Option(help="NAME, NAME:input, or auto: an activation in the middle.")] = "auto",
) -> None:
    """One layer's output in every checkpoint: ranges by channel (Figure 3) and densities of three images (Figure 4).

    A layer is named as in model.named_modules(); NAME:input is what goes into NAME before its quantizer.

    What was measured before is not measured again.

    [bold]Examples[/bold]

      fpq-analyze features --ckpt-dir checkpoints/

      fpq-analyze features --ckpt-dir checkpoints/ --layer stages.1.1.relu1
    """
    from fpq_analysis.probes import Features

    measure_and_show([Features(layer)], settings, {"features": print_features})


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
    tell(f"Output of {layers}, means over its channels:")
    print_table(table)
    tell("± 95 %: of the mean, over the images.")
    tell("Rounded: the mean behind the quantizer of the layer that comes next.")
