"""`fpq-analyze report`."""

from __future__ import annotations

import textwrap
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
    serve: Annotated[bool, typer.Option("--serve", help="Show it in a browser, and keep it up to date.")] = False,
    port: Annotated[int, typer.Option(help="For --serve, on this machine alone; 0: any.", min=0, max=65535)] = 8765,
) -> None:
    """One HTML page about all runs: findings, tables, figures, methods, provenance.

    From what is on disk; nothing is measured. What has no records is named, with the command that measures it.

    The page is one file that loads nothing and runs no script, to mail, archive or print.

    With --serve browsers on this machine see it, and it is made anew when the runs or their records change.

    [bold]Examples[/bold]

      fpq-analyze report --ckpt-dir checkpoints/ -o report.html

      fpq-analyze report --ckpt-dir checkpoints/ --serve
    """
    if serve:
        from fpq_analysis.report import live

        return live.serve(ckpt_dir, output, records=records, port=port, log=log)
    from fpq_analysis.report.page import write_report

    written = write_report(ckpt_dir, output, records=records)
    for caution in written.cautions:
        log(f"Note: {caution}")
    for names, command in written.missing:
        log(textwrap.fill(f"Not measured: {names}. To measure:", width=80))
        log(f"  {command}")
    figures = ", ".join(written.figures) or "no figure of measurements"
    echo(f"{written.path}: {written.runs} run{'s' if written.runs > 1 else ''}; {figures}")
