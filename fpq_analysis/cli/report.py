"""`fpq-analyze report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpq_analysis.cli.app import CkptDir, Records, app, echo, guarded, log


@app.command()
@guarded
def report(
    ckpt_dir: CkptDir = Path("checkpoints"),
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    records: Records = None,
) -> None:
    """One HTML page about all runs: findings, tables, figures, methods, provenance.

    From what is on disk; nothing is measured. What has no records is named, with the command that measures it.

    The page is one file that loads nothing and runs no script, to mail, archive or print.

    [bold]Example[/bold]

      fpq-analyze report --ckpt-dir checkpoints/ -o report.html
    """
    from fpq_analysis.report.page import write_report

    written = write_report(ckpt_dir, output, records=records)
    for caution in written.cautions:
        log(f"Note: {caution}")
    for name, command in written.missing:
        log(f"Not measured: {name} ({command})")
    figures = ", ".join(written.figures) or "no figure of measurements"
    echo(f"{written.path}: {written.runs} runs; {figures}")
