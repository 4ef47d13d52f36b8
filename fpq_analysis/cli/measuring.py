"""What every command that measures checkpoints does: plan, forecast or measure, show, draw, and count what failed."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fpq_analysis.cli.app import (
    CkptDir,
    DataRoot,
    Device,
    DryRun,
    Engine,
    Epochs,
    Figures,
    Jobs,
    Json,
    Loss,
    Model,
    NData,
    Overwrite,
    Records,
    Seed,
    ShardOf,
    app,
    check_model,
    echo,
    fail,
    fail_all,
    guarded,
    log,
    new_table,
    print_json,
    print_table,
    reads_foreign,
)
from fpq_analysis.errors import NothingToDraw, UserError, going_on

if TYPE_CHECKING:
    import pandas as pd

    from fpq_analysis.probes import Probe
    from fpq_analysis.runs.foreign import ForeignRuns


LONGEST_NAME = 16  # of a run, that leaves a table of 80 columns room for its numbers


@dataclass(frozen=True)
class Settings:
    """The options that all measuring commands share."""

    ckpt_dir: Path | ForeignRuns
    n_data: int | None
    seed: int
    data_root: str | None
    model: str | None
    loss: str
    figures: Path
    records: Path | None
    device: str
    jobs: str
    executor: str | None
    shard: str | None
    overwrite: bool
    dry_run: bool
    json: bool
    epochs: str


# Their types and defaults, in the order of the help text; a command's own come behind the first.
SHARED: dict[str, tuple[Any, Any]] = {
    "ckpt_dir": (CkptDir, Path("checkpoints")),
    "n_data": (NData, 1024),
    "epochs": (Epochs, "all"),
    "seed": (Seed, 0),
    "data_root": (DataRoot, None),
    "model": (Model, None),
    "loss": (Loss, "cross_entropy"),
    "figures": (Figures, Path("figures")),
    "records": (Records, None),
    "device": (Device, "auto"),
    "jobs": (Jobs, "1"),
    "executor": (Engine, None),
    "shard": (ShardOf, None),
    "overwrite": (Overwrite, False),
    "dry_run": (DryRun, False),
    "json": (Json, False),
}


def measuring_command(
    fixed: Mapping[str, Any] | None = None, *, folder: Any = None, **defaults: Any
) -> Callable[..., Any]:
    """Register a command whose first argument is `settings: Settings`; the rest are its own options.

    Args:
        fixed: values of shared options that this command does not offer.
        folder: annotation of the folder where it is no option; None: `--ckpt-dir`.
        defaults: of shared options, where they differ from `SHARED`.
    """
    fixed = fixed or {}
    offered = {name: shared for name, shared in SHARED.items() if name not in fixed}
    if folder is not None:
        offered["ckpt_dir"] = folder, inspect.Parameter.empty

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**options: Any) -> None:
            settings = Settings(**{name: options.pop(name) for name in offered}, **fixed)
            _check(settings)
            command(settings, **options)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        _, *own = (one.replace(kind=kind) for one in inspect.signature(command, eval_str=True).parameters.values())
        first, *rest = (
            inspect.Parameter(name, kind, default=defaults.get(name, default), annotation=annotation)
            for name, (annotation, default) in offered.items()
        )
        run.__signature__ = inspect.Signature([first, *own, *rest])  # type: ignore[attr-defined]
        app.command()(guarded(reads_foreign("ckpt_dir")(run)))
        return command

    return decorate


def _check(settings: Settings) -> None:
    """Raise `UserError` for what can be known to be wrong with the shared options before torch is loaded."""
    from fpq_analysis.choices import check_loss_name
    from fpq_analysis.pipeline.engines.engine import check_engine
    from fpq_analysis.pipeline.task import Sampling
    from fpq_analysis.references import find
    from fpq_analysis.text import parse_shard

    Sampling(settings.n_data, settings.seed)
    if settings.shard:
        parse_shard(settings.shard)
    check_engine(settings.executor, settings.jobs)
    check_loss_name(settings.loss)
    if settings.model is not None:
        check_model(settings.model)
    if ":" in settings.loss:
        find(settings.loss, "loss")


def check_runs(settings: Settings) -> None:
    """Raise `UserError` if there is nothing to measure, before torch is loaded; after a command's own options."""
    from fpq_analysis.runs import find_runs

    if isinstance(settings.ckpt_dir, Path):
        find_runs(settings.ckpt_dir, monitored=True)


def measure_and_show(
    probes: Sequence[Probe],
    settings: Settings,
    show: Mapping[str, Callable[[pd.DataFrame], None]],
    *,
    through: Sequence[Path] = (),
    rows: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
    pages: Sequence[Callable[[pd.DataFrame], None]] = (),
) -> None:
    """Measure what is not measured yet, print and draw all of it; exit with 1 if anything could not be done.

    Args:
        show: prints the records of a probe, by the probe's name.
        through: see `measure`.
        rows: what `--json` prints, made from the records; None: these themselves.
        pages: write what else there is to see, from all the records.
    """
    import pandas as pd

    from fpq_analysis.pipeline.engines.engine import open_engine
    from fpq_analysis.pipeline.forecast import forecast
    from fpq_analysis.pipeline.plan import plan
    from fpq_analysis.pipeline.run import run
    from fpq_analysis.pipeline.task import WHOLE, Sampling
    from fpq_analysis.probes.point import NEEDS
    from fpq_analysis.text import parse_shard

    where = settings.device, settings.data_root
    sampling = Sampling(settings.n_data, settings.seed, *where, settings.model, settings.loss)
    shard = parse_shard(settings.shard) if settings.shard else WHOLE
    options: dict[str, Any] = {"epochs": settings.epochs, "through": through, "shard": shard}
    options |= {"overwrite": settings.overwrite, "records": settings.records}
    found: dict[str, list[pd.DataFrame]] = {}
    faults: dict[Path, UserError] = {}
    forecasts, checkpoints = [], 0
    folder = settings.records or Path(settings.ckpt_dir)
    with open_engine(settings.executor, settings.jobs, device=settings.device, folder=folder) as engine:
        if engine.about and not settings.dry_run:
            log(engine.about)
        for probe in probes:
            todo = plan(settings.ckpt_dir, probe, sampling, **options)
            bad = f", {len(todo.faults)} unreadable" if todo.faults else ""
            log(f"{probe.name}: {todo.n_done} done, {todo.n_left} to do{bad}")
            checkpoints = len(todo.measurements) + len(todo.done) + len(todo.faults)
            if not checkpoints and probe.needs and shard == WHOLE:
                log(f"No checkpoint has what {probe.name} needs: {'; '.join(NEEDS[need] for need in probe.needs)}.")
            if settings.dry_run:
                what = ", ".join([probe.name, *filter(None, [vars(probe).get("definition")])])
                forecasts.append(forecast(todo, faults.__setitem__).assign(measurement=what))
            else:
                found.setdefault(probe.name, []).append(run(todo, executor=engine, on_fault=faults.__setitem__))
        if settings.dry_run:
            costs = pd.concat(forecasts, ignore_index=True)
            print_forecast(costs)
            echo(engine.outlook(int(costs["to do"].sum()), float(costs["seconds"].sum())))
            fail_all(faults)
            return

    frames = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}
    everything = pd.concat(frames.values(), ignore_index=True)
    if settings.json:
        print_json(rows(everything) if rows else everything)
    unshown: list[UserError] = []
    if shard != WHOLE:
        log(f"Part {settings.shard} is done. After all of them, run it without --shard to draw.")
    else:
        unshown = _show(frames, settings, show)
        for page in pages:
            with going_on(unshown.append, "The page"), contextlib.suppress(NothingToDraw):
                page(everything)
    for kind in sorted({str(kind) for kind in everything["dtype"].dropna() if "measured in" in str(kind)}):
        log(f"Weights in some of the files: {kind}.")
    for fault in unshown:
        fail(fault)
    if faults:
        log(f"{len(faults)} of {checkpoints} checkpoints could not be measured.")
    unreached = int((everything["status"] == "tolerance not reached").sum())
    if unreached:
        log(f"{unreached} numbers did not reach the tolerance; their errors stand beside them in the records.")
    fail_all(faults)
    if unshown or unreached:
        raise typer.Exit(1)


def _show(
    frames: Mapping[str, pd.DataFrame], settings: Settings, show: Mapping[str, Callable[[pd.DataFrame], None]]
) -> list[UserError]:
    """Tables, unless rows were asked for, and figures; what went wrong."""
    from fpq_analysis.records.queries import ordered

    faults: list[UserError] = []
    for name, frame in frames.items():
        if not settings.json:
            with going_on(faults.append, f"The table of {name}"):
                show[name](shorten_runs(ordered(frame)))
    for name, frame in frames.items():
        faults += draw(name, frame, settings.figures)
    return faults


def draw(probe: str, frame: pd.DataFrame, folder: Path) -> list[UserError]:
    """Write the figures of this probe's records into `folder`; nothing where there is nothing finite.

    Returns:
        What went wrong.
    """
    from fpq_analysis.plots import FIGURES
    from fpq_analysis.text import written

    faults: list[UserError] = []
    for drawing in FIGURES.values():
        if drawing.probe == probe:
            with going_on(faults.append, drawing.title), contextlib.suppress(NothingToDraw):
                log(f"{drawing.title}: {written(drawing.write(frame, folder))}")
    return faults


def shorten_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The same with run names without the beginning that all share, where they would be too long for a table."""
    names = [str(name) for name in frame["run"].unique()]
    if len(names) < 2 or max(map(len, names)) <= LONGEST_NAME:
        return frame
    first, last = min(names), max(names)  # what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    shared = first[: max(first.rfind("-", 0, length), first.rfind("/", 0, length)) + 1]
    if shared:
        log(f"All runs begin with {shared}, which is left out below.")
    return frame.assign(run=[str(run).removeprefix(shared) for run in frame["run"]])


def some_epochs(frame: pd.DataFrame) -> pd.DataFrame:
    """Of every run's epochs the first, the last and some between."""
    import pandas as pd

    kept = []
    for _, run in frame.groupby(["run", "definition"], sort=False, dropna=False):
        epochs = sorted(run["epoch"].unique())
        step = max(1, (len(epochs) - 1) // 4)
        kept.append(run[run["epoch"].isin([*epochs[::step], epochs[-1]])])
    return pd.concat(kept) if kept else frame


def print_quantities(frame: pd.DataFrame, headings: Mapping[str, str]) -> None:
    """Whole-network quantities side by side with their 95 % interval, some epochs of every run.

    Args:
        headings: quantity to heading, in the order of the columns.
    """
    from fpq_analysis.text import number

    rows = some_epochs(frame[(frame["layer"] == "all") & frame["quantity"].isin(list(headings))])
    if rows.empty:
        return
    table = new_table({"Run": "left", "Epoch": "right", **dict.fromkeys(headings.values(), "right")})
    for run, group in rows.groupby("run", sort=False):
        for epoch, one in group.groupby("epoch"):
            by_name = one.drop_duplicates("quantity", keep="last").set_index("quantity")
            cells = []
            for quantity in headings:
                if quantity not in by_name.index:
                    cells.append("")
                    continue
                value, half = (float(by_name[column][quantity]) for column in ("value", "ci95"))
                cells.append(number(value, 3) + (f" ± {number(half, 2)}" if half > 0 else ""))
            table.add_row(str(run), str(epoch), *cells)
        table.add_section()
    print_table(table)


def print_forecast(frame: pd.DataFrame) -> None:
    """What `--dry-run` shows: a row a run, with time and memory."""
    table = new_table({name: "left" if name == "run" else "right" for name in frame.columns})
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    print_table(table)
