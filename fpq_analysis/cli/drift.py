"""`fpq-analyze drift`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fpq_analysis.cli.app import tell
from fpq_analysis.cli.measuring import Settings, measure_and_show, measuring_command, print_quantities

if TYPE_CHECKING:
    import pandas as pd


@measuring_command()
def drift(
    settings: Settings,
) -> None:
    """How far each quantized run's features have drifted from those of the float run it started from.

    At the output of every convolution, on the same images; as a table, against the epoch, and layer by layer.

    What was measured before is not measured again.

    [bold]Example[/bold]

      fpq-analyze drift --ckpt-dir checkpoints/
    """
    from fpq_analysis.probes import Drift

    measure_and_show([Drift()], settings, {"drift": print_drift})


def print_drift(frame: pd.DataFrame) -> None:
    """The network's drift, a row a checkpoint; of long runs the first, the last and some between."""
    if frame.empty:
        return
    heads = {"mean_shift": "Mean shift", "decorrelation": "1 - correlation", "wasserstein": "Wasserstein"}
    print_quantities(frame, heads)
    tell("Shift and Wasserstein-1 distance in standard deviations of the float channels;")
    tell("means over channels and convolutions. ±: 95 % over the images, not over runs.")
