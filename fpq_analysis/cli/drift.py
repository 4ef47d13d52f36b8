"""`fpq-analyze drift`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fpq_analysis.cli.app import (
    CkptDir,
    DataRoot,
    Device,
    DryRun,
    Epochs,
    Figures,
    Json,
    Model,
    NData,
    Overwrite,
    Seed,
    app,
    guarded,
    reads_foreign,
)
from fpq_analysis.cli.measuring import Settings, measure_and_show, print_quantities

if TYPE_CHECKING:
    import pandas as pd


@app.command()
@guarded
@reads_foreign("ckpt_dir")
def drift(
    ckpt_dir: CkptDir = Path("checkpoints"),
    n_data: NData = 1024,
    epochs: Epochs = "all",
    seed: Seed = 0,
    data_root: DataRoot = None,
    model: Model = None,
    figures: Figures = Path("figures"),
    device: Device = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """How far each quantized run's features have drifted from those of the float run it started from.

    At the output of every convolution, on the same images; as a table, against the epoch, and layer by layer.

    What was measured before is not measured again.

    [bold]Example[/bold]

      fpq-analyze drift --ckpt-dir checkpoints/
    """
    from fpq_analysis.probes import Drift

    settings = Settings(ckpt_dir, n_data, seed, data_root, model, figures, device, overwrite, dry_run, json, epochs)
    measure_and_show([Drift()], settings, {"drift": print_drift})


def print_drift(frame: pd.DataFrame) -> None:
    """The network's drift, a row a checkpoint; of long runs the first, the last and some between."""
    if frame.empty:
        return
    heads = {"mean_shift": "Mean shift", "decorrelation": "1 - correlation", "wasserstein": "Wasserstein"}
    print_quantities(frame, heads)
    print("Shift and Wasserstein-1 distance in standard deviations of the float channels;")
    print("means over channels and convolutions. ±: 95 % over the images, not over runs.")
