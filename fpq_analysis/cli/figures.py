"""`fpq-analyze figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpq_analysis.cli.app import (
    CkptDir,
    DataRoot,
    Device,
    Figures,
    Json,
    Model,
    NData,
    Records,
    Seed,
    app,
    fail_all,
    guarded,
    log,
    print_json,
    reads_foreign,
)
from fpq_analysis.errors import UserError


@app.command()
@guarded
@reads_foreign("ckpt_dir")
def figures(
    which: Annotated[list[str] | None, typer.Argument(help="1 to 5, another by name, or all.")] = None,
    ckpt_dir: CkptDir = Path("checkpoints"),
    out: Figures = Path("figures"),
    measure: Annotated[bool, typer.Option(help="Measure first what is missing.")] = True,
    n_data: NData = 1024,
    seed: Seed = 0,
    data_root: DataRoot = None,
    model: Model = None,
    records: Records = None,
    runs: Annotated[
        list[str] | None, typer.Option(help="Only runs whose name fits, for example '*w4a4*'; may be repeated.")
    ] = None,
    width: Annotated[int, typer.Option(help="Width of a figure, in columns of a page.", min=1, max=2)] = 2,
    label: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TEXT: what to call a data set, network, method or run; may be repeated."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Figures 1 to 5 of the paper, and others, of all runs below a folder: PNG, PDF, and the caption as text.

    What a figure needs and is not measured yet is measured first. With --no-measure figures are drawn from the records
    alone, without checkpoints and data.

    [bold]Examples[/bold]

      fpq-analyze figures all --ckpt-dir checkpoints/

      fpq-analyze figures 3 4 --ckpt-dir checkpoints/demo --no-measure

      fpq-analyze figures 5 --runs '*w4a4*' --width 1 --label 'imagefolder=CIFAR-10 (JPEG)'
    """
    from fpq_analysis.pipeline.figures import draw_figures

    faults: dict[Path, UserError] = {}
    drawn = draw_figures(
        ckpt_dir,
        which or "all",
        out,
        measure=measure,
        n_data=n_data,
        seed=seed,
        device=device,
        data_root=data_root,
        model=model,
        records=records,
        runs=runs,
        columns=width,
        labels=_labels(label or []),
        on_fault=faults.__setitem__,
        log=log,
    )
    if json:
        print_json(drawn.assign(path=[path and str(path) for path in drawn["path"]]))
    fail_all(faults)
    if drawn["path"].isna().any():
        raise typer.Exit(1)


def _labels(pairs: list[str]) -> dict[str, str]:
    """`NAME=TEXT`, taken apart."""
    for pair in pairs:
        if not pair.partition("=")[2]:
            raise UserError(f"--label {pair} says no name: --label 'imagefolder=CIFAR-10 (JPEG)', for example.")
    return {name: text for name, _, text in (pair.partition("=") for pair in pairs)}
