"""`fpq-analyze gradnorm`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.cli.app import tell
from fpq_analysis.cli.measuring import Settings, measure_and_show, measuring_command, print_quantities

if TYPE_CHECKING:
    import pandas as pd


@measuring_command()
def gradnorm(
    settings: Settings,
    definition: Annotated[str, typer.Option(help="dequantized, latent or float.")] = "dequantized",
    n_draws: Annotated[int, typer.Option(help="Of noise in the weights; a quarter in features.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Of the minibatches.")] = 256,
) -> None:
    """Gradient norm of every checkpoint: clean, with noise in features, with noise in weights; and Figure 2.

    The noise is one quantization step wide, in every convolution's input or weight. With as many images as four
    minibatches or more the figure's intervals are of use. What was measured before is not measured again.

    [bold]Examples[/bold]

      fpq-analyze gradnorm --ckpt-dir checkpoints/

      fpq-analyze gradnorm --ckpt-dir checkpoints/lsq-w4a4 --n-data 4096
    """
    from fpq_analysis.probes import GradNorm

    measure_and_show([GradNorm(definition, n_draws, batch_size)], settings, {"gradnorm": _print_norms})


def _print_norms(frame: pd.DataFrame) -> None:
    minibatch = "grad_norm_minibatch"
    rows = frame[(frame["layer"] == "all") & frame["quantity"].str.startswith(f"{minibatch}@")]
    headings = {f"{minibatch}@{arm}": head for arm, head in _ARMS.items()} if len(rows) else {}
    print_quantities(frame, {**headings, "grad_norm@clean": "All data"})
    if headings:
        text = (
            f"Clean, features, weights: mean norm over {rows['estimator'].iloc[0]}, and in noise of a rounding step. "
        )
    else:
        text = "The data do not fill a minibatch; a smaller --batch-size gives minibatch norms. "
    text += "All data: norm of their mean gradient, clean. ± 95 %: over minibatches or images, and draws of the noise."
    tell(textwrap.fill(text, width=80))


_ARMS = {"clean": "Clean", "features": "Features", "weights": "Weights"}
