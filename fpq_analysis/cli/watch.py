"""`fpq-analyze watch`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.choices import check_definition, check_known
from fpq_analysis.cli.app import echo, fail, fail_all, log
from fpq_analysis.cli.measuring import Settings, draw, measuring_command, shorten_runs
from fpq_analysis.errors import UserError, going_on
from fpq_analysis.measures import MEASURES
from fpq_analysis.runs.run import check_watched

if TYPE_CHECKING:
    import pandas as pd


@measuring_command(
    {"shard": None, "overwrite": False, "dry_run": False, "json": False},
    folder=Annotated[Path, typer.Argument(help="The folder that checkpoints are written to.")],
)
def watch(
    settings: Settings,
    probes: Annotated[
        str, typer.Option(help="What to measure, with commas: hessian_trace,gradnorm.")
    ] = "hessian_trace",
    definition: Annotated[str, typer.Option(help="dequantized, latent or float.")] = "dequantized",
    interval: Annotated[float, typer.Option(help="Seconds between two looks at the folder.")] = 10.0,
    timeout: Annotated[
        float | None, typer.Option(help="End after so many seconds without a change (0: one look). Default: never.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The report.")] = Path("report.html"),
) -> None:
    """Measure checkpoints as they appear, and keep the figures and the report up to date.

    A file is measured once it is whole: its run's manifest names it, or it did not change between two looks. Files may
    come late or in any order; one that fails is tried again. Ctrl-C ends it, and what was measured is kept.

    [bold]Examples[/bold]

      fpq-analyze watch checkpoints/

      fpq-analyze watch runs/own --model mynet:make --data cifar10 --timeout 3600
    """
    names = list(dict.fromkeys(name.strip() for name in probes.split(",")))
    known = [name for name, row in MEASURES.items() if row.probe]
    for name in names:
        check_known("measurement", name, known)
    check_definition(definition)
    check_watched(Path(settings.ckpt_dir))
    import fpq_analysis.pipeline.watch as pipeline
    from fpq_analysis.cli.hessian import print_traces
    from fpq_analysis.probes import PROBES
    from fpq_analysis.records.queries import totals
    from fpq_analysis.report.page import write_report

    every = [PROBES[name]() for name in names]
    defined = [replace(probe, definition=definition) if "definition" in vars(probe) else probe for probe in every]
    log(f"Watching '{Path(settings.ckpt_dir)}', with a look every {interval:g} seconds.")
    faults: dict[Path, UserError] = {}

    def redraw(frame: pd.DataFrame) -> None:
        log(f"{frame['checkpoint'].nunique()} checkpoints are measured.")
        for name in names:
            for fault in draw(name, frame[frame["probe"] == name], settings.figures):
                fail(fault)
        with going_on(fail, "The report"):
            log(f"Report: {write_report(Path(settings.ckpt_dir), output, records=settings.records).path}")

    try:
        found = pipeline.watch(
            settings.ckpt_dir,
            defined,
            interval=interval,
            timeout=timeout,
            n_data=settings.n_data,
            seed=settings.seed,
            epochs=settings.epochs,
            device=settings.device,
            data_root=settings.data_root,
            model=settings.model,
            loss=settings.loss,
            records=settings.records,
            executor=settings.executor,
            jobs=settings.jobs,
            on_round=redraw,
            on_fault=faults.__setitem__,
        )
    except UserError:
        fail_all(faults)  # that none could be measured says less
        raise
    traces = found[found["probe"] == "hessian_trace"]
    if len(totals(traces)):
        print_traces(shorten_runs(traces))
    else:
        echo(f"{found['checkpoint'].nunique()} checkpoints are measured.")
    fail_all(faults)
