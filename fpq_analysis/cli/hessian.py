"""`fpq-analyze hessian`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpq_analysis.cli.app import DataRoot, Device, Json, app, fail, guarded, new_table, print_json, print_table, say
from fpq_analysis.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@app.command()
@guarded
def hessian(
    ckpt_dir: Annotated[Path, typer.Option(help="A run, or a folder of runs.")] = Path("checkpoints"),
    definition: Annotated[str, typer.Option(help="dequantized, latent or float.")] = "dequantized",
    method: Annotated[str, typer.Option(help="auto, exact, sampled or hutchinson.")] = "auto",
    engine: Annotated[str, typer.Option(help="builtin, or pyhessian as a cross-check.")] = "builtin",
    n_data: Annotated[int, typer.Option(help="Training images to measure on.")] = 1024,
    tol: Annotated[float | None, typer.Option(help="Wanted relative error from probes (hutchinson, sampled).")] = None,
    n_products: Annotated[int, typer.Option(help="Products without --tol (not exact, sampled).")] = 100,
    n_labels: Annotated[int, typer.Option(help="Labels an image without --tol (sampled).")] = 4,
    seed: Annotated[int, typer.Option(help="Of the images and of the probes.")] = 0,
    data_root: DataRoot = None,
    model: Annotated[str | None, typer.Option(help="For your own network: package.module:factory.")] = None,
    figures: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("figures"),
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure again what was measured.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs with time and memory, and stop.")] = False,
    json: Json = False,
) -> None:
    """Hessian trace of every checkpoint of every run, as a table and as Figure 5.

    What was measured before is not measured again.

    [bold]Examples[/bold]

      fpq-analyze hessian --ckpt-dir checkpoints/

      fpq-analyze hessian --ckpt-dir checkpoints/fpq --definition latent --json
    """
    from fpq_analysis import measurement
    from fpq_analysis.probes import HessianTrace

    if engine not in ("builtin", "pyhessian"):
        raise UserError(f"Unknown engine '{engine}'. Known: builtin, pyhessian.")
    if engine == "pyhessian" and method != "auto":
        raise UserError("PyHessian knows one method, Hutchinson's; leave --method out with --engine pyhessian.")
    probe = HessianTrace(definition, "pyhessian" if engine == "pyhessian" else method, tol, n_products, n_labels)
    todo = measurement.plan(ckpt_dir, probe, n_data=n_data, seed=seed, overwrite=overwrite)
    say(f"{len(todo.done)} done, {len(todo.jobs)} to do" + (f", {len(todo.faults)} unreadable" if todo.faults else ""))
    where: dict[str, Any] = {"n_data": n_data, "seed": seed, "device": device, "data_root": data_root, "model": model}
    if dry_run:
        _print_forecast(measurement.forecast(todo, probe, **where))
        return
    faults: list[UserError] = []
    frame = measurement.carry_out(todo, probe, on_fault=lambda path, fault: faults.append(fault), **where)
    if json:
        print_json(frame)
    else:
        print_traces(frame)
    draw_figure5(frame, figures)
    for fault in faults:
        fail(fault)
    if faults:
        total = len(todo.jobs) + len(todo.done) + len(todo.faults)
        say(f"{len(faults)} of {total} checkpoints could not be measured.")
    unreached = int((frame["status"] == "tolerance not reached").sum())
    if unreached:
        say(f"{unreached} measurements did not reach --tol {tol}; their errors stand beside them.")
    if faults or unreached:
        raise typer.Exit(1)


def draw_figure5(frame: pd.DataFrame, folder: Path) -> None:
    """Write Figure 5 of these records into `folder`; nothing without a finite trace."""
    from fpq_analysis.plots import caption5, figure5, save
    from fpq_analysis.plots.figure5 import totals

    if totals(frame).empty:
        return
    written = save(figure5(frame), folder / "figure5", caption5(frame))
    say("Figure 5: " + ", ".join(str(path) for path in written))


def print_traces(frame: pd.DataFrame) -> None:
    """The whole-network traces, a row a checkpoint; of long runs the first, the last and some between."""
    from fpq_analysis.comparison import against_baseline, number
    from fpq_analysis.plots.figure5 import totals

    rows = totals(frame)
    if rows.empty:
        return
    clipped = frame[frame["quantity"] == "clipped_fraction"].set_index("key")["value"]
    table = new_table(
        {"Run": "left", "Epoch": "right", "Trace": "right", "± 95 %": "right", "Clipped": "right", "Method": "left"}
    )
    for _, run in rows.groupby(["run", "definition", "estimator", "n_data", "seed"], sort=False):
        run = run.sort_values("epoch")
        step = max(1, (len(run) - 1) // 4)
        for i in sorted({*range(0, len(run), step), len(run) - 1}):
            row = run.iloc[i]
            how = row["estimator"] if row["definition"] == "dequantized" else f"{row['estimator']}, {row['definition']}"
            share = f"{100 * clipped.get(row['key'], 0.0):.1f} %"
            table.add_row(row["run"], str(row["epoch"]), number(row["value"], 4), number(row["ci95"], 2), share, how)
        table.add_section()
    print_table(table)
    if rows["sem_data"].notna().any():
        print("± 95 %: over the images measured on, not over training runs.")
    if rows["sem_data"].isna().any():
        print("± 95 % of hutchinson and pyhessian: over the probes, for these images.")
    print("Clipped: share of the weights outside their quantizer's grid.")
    differences = against_baseline(rows)
    if differences:
        print("\nOn the same images, image by image (± 95 %; one training run each):")
        for difference in differences:
            print(textwrap.fill(difference.sentence(), width=80, initial_indent="  ", subsequent_indent="    "))


def _print_forecast(frame: pd.DataFrame) -> None:
    table = new_table({name: "left" if name == "run" else "right" for name in frame.columns})
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    print_table(table)
