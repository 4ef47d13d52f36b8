"""`fpq-analyze doctor`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.cli.app import (
    DataRoot,
    Device,
    Json,
    Loss,
    app,
    check_there,
    echo,
    guarded,
    log,
    new_table,
    print_json,
    print_table,
    reads_foreign,
)
from fpq_analysis.text import counted, printable

if TYPE_CHECKING:
    import pandas as pd


@app.command()
@guarded
@reads_foreign("checkpoint")
def doctor(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint file, or a run: its last checkpoint.")],
    data_root: DataRoot = None,
    model: Annotated[str | None, typer.Option(help="For your own network: package.module:factory.")] = None,
    loss: Loss = "cross_entropy",
    device: Device = "auto",
    n_data: Annotated[int, typer.Option(help="Samples to check on, and to forecast for.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the samples and of random directions.")] = 0,
    json: Json = False,
) -> None:
    """Can curvature be measured on this checkpoint? Checks, cures, and what each measurement will cost.

    Exits with 1 if there is a fault.

    [bold]Examples[/bold]

      fpq-analyze doctor checkpoints/fpq

      fpq-analyze doctor runs/own --model mynet:make --data cifar10
    """
    check_there(Path(checkpoint))
    from fpq_analysis.doctor import FAULT, NOTE, advice, diagnose_checkpoint

    findings, costs, workers, n_data = diagnose_checkpoint(
        checkpoint, n_data=n_data, seed=seed, data_root=data_root, model=model, loss=loss, device=device
    )
    faults, notes = (int((findings["status"] == status).sum()) for status in (FAULT, NOTE))
    if json:
        print_json(findings)
        print_json(costs)
        print_json(workers)
    else:
        _print_findings(findings)
        if not costs.empty:
            echo()
            _print_forecast(costs, n_data)
            echo()
            _print_workers(workers)
            echo(textwrap.fill(advice(workers), width=80))
    log(f"{counted(len(findings), 'check')}: {counted(faults, 'fault')}, {counted(notes, 'note')}.")
    if faults:
        raise typer.Exit(1)


def _print_findings(findings: pd.DataFrame) -> None:
    from rich.text import Text

    table = new_table({"Check": "left", "Status": "left", "Finding": "left"})
    table.columns[2].overflow = "fold"  # a cure must not be cut
    for row in findings.itertuples(index=False):
        cure = ("\n", ("Cure:", "bold"), f" {printable(str(row.cure))}") if row.cure else ()
        table.add_row(str(row.check), str(row.status), Text.assemble(printable(str(row.finding)), *cure))
    print_table(table)


def _print_forecast(costs: pd.DataFrame, n_data: int) -> None:
    heads = {f"Forecast for {n_data} samples": "left", "Device": "left", "Seconds": "right", "Peak MB": "right"}
    table = new_table(heads)
    for device, name, seconds, peak in costs.itertuples(index=False):
        figures = [f"{value:.3g}" if value == value else "-" for value in (seconds, peak)]
        table.add_row(str(name), str(device), *figures)
    print_table(table)


def _print_workers(workers: pd.DataFrame) -> None:
    heads = {"Many checkpoints": "left", "Device": "left", "Threads each": "right", "Seconds each": "right"}
    table = new_table({**heads, "MB of all": "right", "Free MB": "right"})
    for device, processes, threads, seconds, *memory in workers.itertuples(index=False):
        table.add_row(f"--jobs {processes}", str(device), str(threads), f"{seconds:.3g}", *(f"{m:.0f}" for m in memory))
    print_table(table)
