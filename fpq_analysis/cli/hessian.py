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
    definition: Annotated[str, typer.Option(help="dequantized, latent, float, or all three.")] = "dequantized",
    top_k: Annotated[int, typer.Option(help="Largest eigenvalues, so many.")] = 0,
    density: Annotated[bool, typer.Option("--density", help="Spectral density, with its figure.")] = False,
    sharpness: Annotated[bool, typer.Option("--sharpness", help="Sharpness that survives rescaling.")] = False,
    method: Annotated[str, typer.Option(help="Of the trace: auto, exact, sampled, deflated, ...")] = "auto",
    engine: Annotated[str, typer.Option(help="builtin, or pyhessian as a cross-check.")] = "builtin",
    n_data: Annotated[int | None, typer.Option(help="Training images. Default: 1024; with --tol, all.")] = None,
    tol: Annotated[float | None, typer.Option(help="Wanted relative standard error of the trace.")] = None,
    n_products: Annotated[int, typer.Option(help="Products without --tol (not exact, sampled).")] = 100,
    n_labels: Annotated[int, typer.Option(help="Labels an image without --tol (sampled).")] = 4,
    seed: Annotated[int, typer.Option(help="Of the images and of the probes.")] = 0,
    data_root: DataRoot = None,
    model: Annotated[str | None, typer.Option(help="For your own network: package.module:factory.")] = None,
    figures: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("figures"),
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure again what was measured.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs with time and memory, and stop.")] = False,
    json: Json = False,
) -> None:
    """Hessian of every checkpoint of every run: its trace, as a table and as Figure 5, and what else is asked for.

    What was measured before is not measured again. With --tol, as few of the training images are drawn as the error of
    the trace over all of them needs.

    [bold]Examples[/bold]

      fpq-analyze hessian --ckpt-dir checkpoints/

      fpq-analyze hessian --ckpt-dir checkpoints/fpq --top-k 5 --density

      fpq-analyze hessian --ckpt-dir checkpoints/ --definition all --json
    """
    import pandas as pd

    from fpq_analysis import measurement
    from fpq_analysis.probes import HessianDensity, HessianEigs, HessianTrace, Probe, Sharpness
    from fpq_analysis.quantizers import DEFINITIONS

    if engine not in ("builtin", "pyhessian"):
        raise UserError(f"Unknown engine '{engine}'. Known: builtin, pyhessian.")
    if engine == "pyhessian" and method != "auto":
        raise UserError("PyHessian knows one method, Hutchinson's; leave --method out with --engine pyhessian.")
    probes: list[Probe] = []
    for kind in DEFINITIONS if definition == "all" else [definition]:
        probes.append(HessianTrace(kind, "pyhessian" if engine == "pyhessian" else method, tol, n_products, n_labels))
        if top_k:
            probes.append(HessianEigs(kind, top_k))
        if density:
            probes.append(HessianDensity(kind))
        if sharpness and kind != "latent":
            probes.append(Sharpness(kind))

    settings: dict[str, Any] = {"n_data": n_data or (None if tol else 1024), "seed": seed}
    where: dict[str, Any] = {**settings, "device": device, "data_root": data_root, "model": model}
    found: dict[str, list[pd.DataFrame]] = {}
    faults: dict[Path, UserError] = {}
    forecasts, checkpoints = [], 0
    for probe in probes:
        todo = measurement.plan(ckpt_dir, probe, overwrite=overwrite, **settings)
        bad = f", {len(todo.faults)} unreadable" if todo.faults else ""
        say(f"{probe.name}: {len(todo.done)} done, {len(todo.jobs)} to do{bad}")
        checkpoints = len(todo.jobs) + len(todo.done) + len(todo.faults)
        if dry_run:
            forecast = measurement.forecast(todo, probe, **where)
            forecasts.append(forecast.assign(measurement=f"{probe.name}, {vars(probe)['definition']}"))
            continue
        frame = measurement.carry_out(todo, probe, on_fault=faults.__setitem__, **where)
        found.setdefault(probe.name, []).append(frame)
    if dry_run:
        _print_forecast(pd.concat(forecasts, ignore_index=True))
        return

    frames = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}
    if json:
        print_json(pd.concat(frames.values(), ignore_index=True))
    else:
        show = {
            "hessian_trace": print_traces,
            "hessian_eigs": _print_eigenvalues,
            "hessian_density": _print_moments,
            "sharpness": _print_sharpness,
        }
        for name, frame in frames.items():
            show[name](frame)
    for name, frame in frames.items():
        draw(name, frame, figures)
    for fault in faults.values():
        fail(fault)
    if faults:
        say(f"{len(faults)} of {checkpoints} checkpoints could not be measured.")
    unreached = sum(int((frame["status"] == "tolerance not reached").sum()) for frame in frames.values())
    if unreached:
        say(f"{unreached} numbers did not reach the tolerance; their errors stand beside them in the records.")
    if faults or unreached:
        raise typer.Exit(1)


def draw(probe: str, frame: pd.DataFrame, folder: Path) -> None:
    """Write the figure of this probe's records into `folder`; nothing where there is nothing finite."""
    from fpq_analysis import plots

    figures: dict[str, tuple[str, str, Any, Any]] = {
        "hessian_trace": ("Figure 5", "figure5", plots.figure5, plots.caption5),
        "hessian_eigs": ("Eigenvalues", "eigenvalues", plots.eigenvalue_figure, plots.eigenvalue_caption),
        "hessian_density": ("Density", "density", plots.density_figure, plots.density_caption),
    }
    if probe not in figures:
        return
    title, name, figure, caption = figures[probe]
    try:
        drawn = figure(frame)
    except ValueError:
        return
    say(f"{title}: " + ", ".join(str(path) for path in plots.save(drawn, folder / name, caption(frame))))


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


def _some(frame: pd.DataFrame) -> pd.DataFrame:
    """Of every run's epochs the first, the last and some between."""
    import pandas as pd

    kept = []
    for _, run in frame.groupby(["run", "definition"], sort=False):
        epochs = sorted(run["epoch"].unique())
        step = max(1, (len(epochs) - 1) // 4)
        kept.append(run[run["epoch"].isin([*epochs[::step], epochs[-1]])])
    return pd.concat(kept) if kept else frame


def _print_eigenvalues(frame: pd.DataFrame) -> None:
    from fpq_analysis.comparison import number
    from fpq_analysis.plots.eigenvalues import eigenvalues

    rows = eigenvalues(frame)
    if rows.empty:
        return
    shown = min(5, int(rows["rank"].max()))
    heads = {f"Eigenv. {i}" if i == 1 else f"{i}": "right" for i in range(1, shown + 1)}
    table = new_table({"Run": "left", "Epoch": "right", **heads, "Products": "right"})
    several = rows["definition"].nunique() > 1
    for (run, definition), group in _some(rows).groupby(["run", "definition"], sort=False):
        for epoch, one in group.groupby("epoch"):
            values = one.sort_values("rank")["value"].head(shown)
            name = f"{run}, {definition}" if several else str(run)
            table.add_row(name, str(epoch), *(number(x, 4) for x in values), str(int(one["n_products"].iloc[0])))
        table.add_section()
    print("")
    print_table(table)
    print("Each within its residual, stored beside it, of an eigenvalue for these images.")


def _print_moments(frame: pd.DataFrame) -> None:
    from fpq_analysis.comparison import number

    table = new_table(
        {"Run": "left", "Epoch": "right", "Trace": "right", "± se": "right", "Σ λ²": "right", "± se ": "right"}
    )
    rows = frame[frame["quantity"].isin(["trace", "squares"])]
    for (run, epoch, _), one in _some(rows).groupby(["run", "epoch", "definition"], sort=False):
        by_name = one.set_index("quantity")
        cells = [number(float(by_name[c][q]), d) for q in ("trace", "squares") for c, d in (("value", 4), ("sem", 2))]
        table.add_row(str(run), str(epoch), *cells)
    print("\nMoments of the spectral density:")
    print_table(table)


def _print_sharpness(frame: pd.DataFrame) -> None:
    from fpq_analysis.comparison import number

    rows = _some(frame[frame["layer"] == "all"])
    print("\nSharpness that survives rescaling, at each run's last epoch:")
    table = new_table({"Run": "left", "Epoch": "right", "Quantity": "left", "Value": "right", "± se": "right"})
    for (run, _), group in rows.groupby(["run", "definition"], sort=False):
        last = group[group["epoch"] == group["epoch"].max()]
        for _, row in last.iterrows():
            numbers = number(row["value"], 4), number(row["sem"], 2)
            table.add_row(str(run), str(row["epoch"]), str(row["quantity"]), *numbers)
        table.add_section()
    print_table(table)


def _print_forecast(frame: pd.DataFrame) -> None:
    table = new_table({name: "left" if name == "run" else "right" for name in frame.columns})
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    print_table(table)
