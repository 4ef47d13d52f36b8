"""`fpq-analyze variance`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.cli.app import tell
from fpq_analysis.cli.measuring import Settings, measure_and_show, measuring_command, print_quantities

if TYPE_CHECKING:
    import pandas as pd


@measuring_command()
def variance(
    settings: Settings,
    sd: Annotated[list[float], typer.Option(help="Of the noise; may be repeated.")] = [0.05, 0.1, 0.2, 0.5],  # noqa: B006
    n_draws: Annotated[int, typer.Option(help="Draws of the noise per image.")] = 8,
) -> None:
    """Variance of every checkpoint's output under Gaussian noise in the image, and Figure 1.

    The noise's standard deviation is in units of the normalised image. What was measured before is not measured again.

    [bold]Examples[/bold]

      fpq-analyze variance --ckpt-dir checkpoints/

      fpq-analyze variance --ckpt-dir checkpoints/ --sd 0.1 --sd 0.3 --n-draws 16
    """
    from fpq_analysis.probes import OutputVariance

    measure_and_show([OutputVariance(tuple(sd), n_draws)], settings, {"output_variance": _print_variances})


def _print_variances(frame: pd.DataFrame) -> None:
    from fpq_analysis.plots.figure1 import SD
    from fpq_analysis.records.queries import nearest, variances

    rows = variances(frame)
    if rows.empty:
        return
    at = nearest(rows, SD)
    heads = {"logit_variance": "Logits", "probability_variance": "Probabilities", "flipped": "Flipped"}
    print_quantities(frame, {f"{quantity}@{at:g}": head for quantity, head in heads.items()})
    text = (
        f"Variance under noise of sd {at:g} in the normalised image, mean over classes and images; flipped: share of "
        "predictions that change. ± 95 %: over the images, draws of the noise included."
    )
    tell(textwrap.fill(text, width=80))
