"""`fpq-analyze compare`."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpq_analysis.choices import check_definition
from fpq_analysis.cli.app import (
    DataRoot,
    Device,
    Engine,
    Jobs,
    Json,
    Loss,
    Model,
    NData,
    Records,
    Seed,
    app,
    echo,
    fail_all,
    guarded,
    log,
    new_table,
    print_json,
    print_table,
    reads_foreign,
)
from fpq_analysis.errors import UserError
from fpq_analysis.pipeline.engines.engine import check_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from fpq_analysis.records.comparison import Difference, SeedsDifference


@app.command()
@guarded
@reads_foreign("run_a", "run_b")
def compare(
    run_a: Annotated[Path, typer.Argument(help="A run.")],
    run_b: Annotated[Path, typer.Argument(help="The run it is compared with.")],
    definition: Annotated[str, typer.Option(help="dequantized, latent or float.")] = "dequantized",
    over_seeds: Annotated[
        bool,
        typer.Option("--over-seeds", help="Take the runs beside that differ in nothing but their seed, too."),
    ] = False,
    measure: Annotated[bool, typer.Option(help="Measure first what is missing.")] = True,
    n_data: NData = 1024,
    seed: Seed = 0,
    data_root: DataRoot = None,
    model: Model = None,
    model_b: Annotated[str | None, typer.Option(help="The same for run_b, where its network is another.")] = None,
    loss: Loss = "cross_entropy",
    records: Records = None,
    device: Device = "auto",
    jobs: Jobs = "1",
    executor: Engine = None,
    json: Json = False,
) -> None:
    """Difference of two runs' Hessian traces, epoch by epoch, on the same samples.

    Sample by sample, so that the interval is that of the difference: two runs share most of their error over the data.
    What is not measured yet is measured first; with --no-measure the records alone are compared, without checkpoints
    and data. With --over-seeds the last epoch of all pairs of runs with equal seeds
    is compared, too, and the interval is over seeds and samples.

    [bold]Examples[/bold]

      fpq-analyze compare checkpoints/demo/fpq-w4a4 checkpoints/demo/lsq-w4a4

      fpq-analyze compare checkpoints/fpq-w4a4-s0 checkpoints/lsq-w4a4-s0 --over-seeds

      fpq-analyze compare runs/int8 runs/float --model mynet:int8 --model-b mynet:Net --data digits
    """
    from fpq_analysis.runs import one_run

    check_definition(definition)
    check_engine(executor, jobs)
    if model_b is not None and not isinstance(run_b, Path):
        run_b = replace(run_b, model=model_b)
    pair = [one_run(folder) if measure else Path(folder) for folder in (run_a, run_b)]
    import pandas as pd

    from fpq_analysis.pipeline.run import measure as measure_runs
    from fpq_analysis.probes import HessianTrace
    from fpq_analysis.records.comparison import alike, by_epoch, told_apart
    from fpq_analysis.records.queries import totals
    from fpq_analysis.text import number

    names = told_apart(*pair)
    faults: dict[Path, UserError] = {}
    measured: Callable[..., pd.DataFrame] = partial(
        measure_runs,
        probe=HessianTrace(definition),
        n_data=n_data,
        seed=seed,
        data_root=data_root,
        loss=loss,
        records=records,
        device=device,
        jobs=jobs,
        executor=executor,
        on_fault=faults.__setitem__,
    )
    if not measure:
        measured = partial(_recorded, definition=definition, loss=loss, records=records)
    networks = model, model_b or model

    def both(runs: Sequence[Any], n_data: int, seed: int, **options: str) -> list[pd.DataFrame]:
        pairs = zip(runs, networks, strict=True)
        frames = [totals(measured(run, model=network, **options)) for run, network in pairs]
        if measure or any(frame.empty for frame in frames):
            return frames
        return list(alike(frames[0], frames[1], n_data, seed))

    traces = both((run_a, run_b), n_data, seed)
    if any(frame.empty for frame in traces):
        fail_all(faults)
    for run, frame in zip(pair, traces, strict=True):
        if frame.empty:
            raise UserError(f"No checkpoint of '{run}' has a finite trace, so there is nothing to compare.")
    found = by_epoch(*(frame.assign(run=name) for frame, name in zip(traces, names, strict=True)))
    several = _over_seeds(pair, found[-1], traces[0], both) if over_seeds else None
    if json:
        rows = [difference.as_row() for difference in found]
        print_json(pd.DataFrame(rows + ([several.as_row()] if several is not None else [])))
        fail_all(faults)
        return
    headings = ("Epoch", *names, "Difference", "± 95 %")  # a run may be called like another column
    table = new_table([(heading, "right") for heading in headings])
    for difference in found:
        ours = difference.baseline_value + difference.value
        numbers = (ours, difference.baseline_value, difference.value)
        table.add_row(str(difference.epoch), *(number(x, 4) for x in numbers), number(difference.ci95, 2))
    print_table(table)
    log("")
    echo(textwrap.fill(found[-1].sentence(), width=80))
    how = "Paired, sample by sample" if found[-1].paired else "Not paired (the measurement does not see single samples)"
    n_used = int(traces[0]["n_data"].max())  # there may be fewer than were asked for
    drawn = "" if measure else f", drawn by --seed {traces[0]['seed'].iloc[0]}"
    errors = "; ± is the error of the random probes alone, for these samples" if found[-1].over_probes else ""
    echo(textwrap.fill(f"{how}: {n_used} samples{drawn}; one training run each{errors}.", width=80))
    if several is not None:
        log("")
        echo(textwrap.fill(several.sentence(*names), width=80))
    fail_all(faults)


def _recorded(
    run: Path, definition: str, loss: str, records: Path | None, epochs: str | None = None, model: str | None = None
) -> pd.DataFrame:
    """Traces from the records alone; `epochs` a single one, and `model` of no use here."""
    from fpq_analysis.records.table import home, read

    where = home(run, run, records)
    if not where.is_dir():
        raise UserError(f"No folder '{where}' with records of '{run}'.")
    folders = sorted(path.parent.parent for path in where.rglob("records/hessian_trace.jsonl"))
    if len(folders) > 1:
        held = ", ".join(folder.name for folder in folders[:3])
        raise UserError(f"'{where}' holds more than one run ({held}); name one of them.")
    frame = read(where, folders, "hessian_trace")
    frame = frame[frame["loss"] == loss]
    wanted = frame["definition"] == definition
    # Of a network without quantizers all three are one.
    frame = frame[wanted if wanted.any() else (frame["definition"] == "float") & (frame["bits"] == "FP")]
    if frame.empty:
        raise UserError(f"'{where}' has no records of the trace as '{definition}' of {loss}. Leave out --no-measure.")
    return frame if epochs is None else frame[frame["epoch"] == int(epochs)]


def _over_seeds(
    pair: list[Path], last: Difference, traces: pd.DataFrame, both: Callable[..., list[pd.DataFrame]]
) -> SeedsDifference:
    """The differences at one epoch of all pairs of runs with equal seeds, on the samples of these traces."""
    from fpq_analysis.records.comparison import SeedsDifference, by_epoch
    from fpq_analysis.runs import seeds_of

    ours, theirs = map(seeds_of, pair)
    seeds = sorted(set(ours) & set(theirs))
    if len(seeds) < 2:
        raise UserError(
            f"Beside '{pair[0]}' and '{pair[1]}' there are no pairs of runs with other training seeds and the same "
            "settings. Train some (fpq-analyze train --seed 1 ...), or leave out --over-seeds."
        )
    n_data, drawn = (int(traces[column].iloc[0]) for column in ("n_data", "seed"))
    found = []
    for seed in seeds:
        frames = both((ours[seed], theirs[seed]), n_data, drawn, epochs=str(last.epoch))
        frames = [frame[(frame["n_data"] == n_data) & (frame["seed"] == drawn)] for frame in frames]
        if not any(frame.empty for frame in frames):
            found += by_epoch(*frames)
    if len(found) < 2:
        raise UserError(f"Fewer than two pairs of runs could be measured at epoch {last.epoch}.")
    return SeedsDifference.of(found)
