"""`fpq-analyze demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpq_analysis.cli.app import Device, Figures, app, guarded, log
from fpq_analysis.cli.hessian import print_eigenvalues, print_moments, print_traces


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("checkpoints/demo"),
    figures: Figures = Path("figures"),
    report: Annotated[Path, typer.Option(help="The page about it all.")] = Path("report.html"),
    device: Device = "auto",
) -> None:
    """The whole job on 1,797 real digits that come with the package: train, measure, figures, report.

    A float ResNet-20, then LSQ and FPQ at W4A4 and W2A4 from it; the exact Hessian trace of every epoch, the largest
    eigenvalues before and after training, spectral densities at W2A4, Figures 1 to 5 of the paper, a loss landscape.
    Minutes on two cores, no download. Stopped, it goes on where it was.

    [bold]Example[/bold]

      fpq-analyze demo
    """
    from fpq_analysis.pipeline.demo import run_demo

    traces, eigenvalues, densities = run_demo(out, figures, report, device=device, log=log)
    print_traces(traces)
    print_eigenvalues(eigenvalues)
    print_moments(densities)
