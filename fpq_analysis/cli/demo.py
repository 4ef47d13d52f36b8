"""`fpq-analyze demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpq_analysis.cli.app import Device, app, guarded, say
from fpq_analysis.cli.hessian import print_traces
from fpq_analysis.cli.measuring import draw


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("checkpoints/demo"),
    figures: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("figures"),
    device: Device = "auto",
) -> None:
    """The whole job on 1,797 real digits that come with the package: train, measure, table, figure.

    A float ResNet-20, then LSQ and FPQ at W4A4 and W2A4 from it; the exact Hessian trace of every epoch. Minutes on two
    cores, no download. Stopped, it goes on where it was.

    [bold]Example[/bold]

      fpq-analyze demo
    """
    from fpq_analysis.demo import run_demo

    frame = run_demo(out, device=device, log=say)
    print_traces(frame)
    draw("hessian_trace", frame, figures)
