"""`fpq-analyze train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpq_analysis.choices import check_model_name
from fpq_analysis.cli.app import (
    Device,
    Engine,
    Jobs,
    Json,
    app,
    echo,
    fail,
    guarded,
    log,
    new_table,
    print_json,
    print_table,
)
from fpq_analysis.cli.options import options_of
from fpq_analysis.errors import UserError
from fpq_analysis.methods import MethodSettings
from fpq_analysis.pipeline.engines.engine import check_engine
from fpq_analysis.quantspec import QuantSpec
from fpq_analysis.training.config import TrainConfig, check_init
from fpq_analysis.training.tensorboard import check_tensorboard

if TYPE_CHECKING:
    import pandas as pd

    from fpq_analysis.pipeline.engines.engine import Engine as AnyEngine
    from fpq_analysis.training import Sweep


@app.command()
@guarded
@options_of(TrainConfig, "Run", {MethodSettings: "Settings of methods"})
def train(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file of a sweep: many runs, see configs/.")] = None,
    shard: Annotated[str | None, typer.Option(help="With --config, i/N: the share of the i-th of N machines.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's or sweep's folder. Default: in checkpoints/.")] = None,
    jobs: Jobs = "1",
    executor: Engine = None,
    download: Annotated[bool, typer.Option(help="Fetch CIFAR into --data-root.")] = False,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an existing run first.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Losses and accuracies for TensorBoard.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Train one network, or with --config all of a sweep; a checkpoint before training and after every epoch.

    A sweep does what is not yet done: finished runs are skipped, a stopped one goes on, and every quantized run starts
    from the float run of its model, data and seed, which is trained once.

    [bold]Examples[/bold]

      fpq-analyze train --epochs 15 --lr 0.1 --out checkpoints/fp

      fpq-analyze train --method fpq --bits W4A4 --init checkpoints/fp --epochs 15

      fpq-analyze train --config configs/small/table2.toml --dry-run
    """
    if tensorboard:
        check_tensorboard()
    where: dict[str, Any] = {"device": device, "download": download, "tensorboard": tensorboard}
    if config is not None:
        _refuse_beside_config(ctx)
        check_engine(executor, jobs)
        if not config.exists():
            raise UserError(f"No file '{config}'. The sweeps that come with the program are in configs/.")
        from fpq_analysis.training import read_sweep

        sweep = read_sweep(config, out=out)
        from fpq_analysis.pipeline.engines.engine import open_engine

        with open_engine(executor, jobs, device=device, folder=sweep.out, batch=1) as engine:
            serial = executor is None and jobs == "1"
            _train_sweep(sweep, config, shard, where, None if serial else engine, dry_run=dry_run, json=json)
        return
    if executor is not None or jobs != "1":
        raise UserError("--jobs and --executor are for the many runs of a sweep: --config sweep.toml")
    if shard is not None:
        raise UserError("--shard is a part of a sweep, and needs the sweep's file: --config sweep.toml")
    check_model_name(options["model"])
    if options["bits"] is not None:
        QuantSpec.parse(options["bits"])  # refuses what is no bit width
    check_init(options["init"])
    settings = TrainConfig(**options)
    run = out or Path("checkpoints") / settings.name
    if dry_run:
        log(f"Would train {run}:")
        for key, value in options.items():
            log(f"  {key} = {value}")
        return
    from fpq_analysis.training import train as run_training

    frame = run_training(settings, run, **where, resume=resume, overwrite=overwrite, log=log)
    if json:
        print_json(frame)
    last = frame.iloc[-1]
    log(f"Done: {run}, epoch {int(last['epoch'])}, test accuracy {100 * last['test_accuracy']:.2f} %")


_OF_SWEEPS = (
    *("config", "shard", "out", "jobs", "executor", "device"),
    *("download", "tensorboard", "resume", "dry_run", "json"),
)


def _refuse_beside_config(ctx: typer.Context) -> None:
    """A sweep's settings belong in its file: one on the command line would be ignored, or override the file unseen."""
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if name not in _OF_SWEEPS and source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            if name == "overwrite":
                raise UserError("--overwrite and --config do not go together; remove the runs to be trained anew.")
            raise UserError(f"With --config, settings come from the file; write {name} there, and leave {option} out.")


def _train_sweep(
    sweep: Sweep,
    file: Path,
    shard: str | None,
    where: dict[str, Any],
    engine: AnyEngine | None,
    *,
    dry_run: bool,
    json: bool,
) -> None:
    from fpq_analysis.text import parse_shard
    from fpq_analysis.training import sweep as sweeps

    if dry_run:
        names = sweep.shard(*parse_shard(shard)) if shard else None
        frame = sweeps.sweep_status(sweep, names)
    else:
        frame = sweeps.run_sweep(sweep, shard=shard, executor=engine, log=log, **where)
    if json:
        print_json(frame)
    else:
        _print_sweep(frame)
    if dry_run:
        log(sweeps.summary(frame))
        todo = frame[frame["status"] != sweeps.DONE]
        if engine is not None and todo["seconds_left"].notna().any():
            echo(engine.outlook(len(todo), float(todo["seconds_left"].sum())))
        return
    if (frame["epoch"] > 0).any():
        log(f"Learning curves of all of them, on one page: fpq-analyze report --ckpt-dir {sweep.out}")
    failed = frame[frame["status"] == sweeps.FAILED]
    waiting = frame[frame["status"] == sweeps.WAITS]
    if len(failed):
        fail(f"{len(failed)} of {len(frame)} runs failed, for the reasons above; the same command tries them again.")
    if len(waiting):
        missing = sorted({sweep.teachers[name] for name in waiting["run"]})
        cure = (
            f"Other parts of the sweep train them. Finish those, bring the float runs into '{sweep.out}' where the "
            f"machines do not share it, and call this again: fpq-analyze train --config {file} --shard {shard}"
        )
        fail(
            f"{len(waiting)} of {len(frame)} runs wait for float runs that are not finished in '{sweep.out}': "
            f"{', '.join(missing)}. {cure if shard else 'These failed; see above.'}"
        )
    if len(failed) or len(waiting):
        raise typer.Exit(1)


def _print_sweep(frame: pd.DataFrame) -> None:
    from fpq_analysis.text import duration

    table = new_table({"Run": "left", "Epoch": "right", "Test %": "right", "Left": "right", "Status": "left"})
    for row in frame.to_dict("records"):
        test, left = row["test_accuracy"], row["seconds_left"]
        table.add_row(
            row["run"],
            f"{row['epoch']}/{row['epochs']}",
            f"{100 * test:.2f}" if test == test else "",
            "" if left == 0 else duration(left) if left == left else "?",
            row["status"],
        )
    print_table(table)
