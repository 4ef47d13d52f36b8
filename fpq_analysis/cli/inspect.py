"""`fpq-analyze inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.cli.app import Json, app, check_there, echo, guarded, log, new_table, print_json, print_table

if TYPE_CHECKING:
    import pandas as pd


@app.command()
@guarded
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint file, of this program or another; or a run.")],
    json: Json = False,
) -> None:
    """What is in a checkpoint, and is it safe to use? Nothing in the file is run to find out.

    Exits with 1 if a file is damaged, differs from its manifest, or would have to run code to load.

    [bold]Examples[/bold]

      fpq-analyze inspect checkpoints/fpq/epoch_0010.pt

      fpq-analyze inspect checkpoints/fpq
    """
    check_there(checkpoint)
    from fpq_analysis.runs import inspection

    if checkpoint.is_dir():
        files = inspection.inspect_run(checkpoint)
        if json:
            print_json(files)
        else:
            _print_files(files)
        wrong = files[files["hash"].isin(["differs", "missing"])]
        if len(wrong):
            log(f"{len(wrong)} of {len(files)} checkpoints are missing or not what the manifest says.")
            raise typer.Exit(1)
        return
    fields = inspection.inspect_checkpoint(checkpoint)
    quantizers = inspection.inspect_quantizers(checkpoint)
    if json:
        print_json(fields)
        print_json(quantizers)
        return
    _print_fields(fields)
    if len(quantizers):
        echo()
        _print_quantizers(quantizers)


def _print_fields(fields: pd.DataFrame) -> None:
    table = new_table({"Field": "left", "Value": "left"})
    for field, value in fields.itertuples(index=False):
        table.add_row(field, value)
    print_table(table)


def _print_quantizers(quantizers: pd.DataFrame) -> None:
    headings = ["Layer", "Of", "Bits", "Step sizes", "Smallest", "Median", "Largest"]
    table = new_table({name: "left" if name in ("Layer", "Of") else "right" for name in headings})
    for layer, of, bits, n, *steps in quantizers.itertuples(index=False):
        table.add_row(str(layer), str(of), str(bits), str(n), *(f"{step:.3g}" for step in steps))
    print_table(table)


def _print_files(files: pd.DataFrame) -> None:
    table = new_table(
        {"File": "left", "Epoch": "right", "Bytes": "right", "SHA-256": "left", "Hash": "left", "Test": "right"}
    )
    for file, epoch, size, digest, status, accuracy in files.itertuples(index=False):
        test = f"{100 * accuracy:.2f} %" if accuracy == accuracy else "-"
        table.add_row(file, str(epoch), f"{size:,}", f"{digest[:12]}...", status, test)
    print_table(table)
