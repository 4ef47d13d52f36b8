"""The command line: parse, call, print.  Every command is one Python call; torch is imported only when one runs.

Results go to stdout, everything else to stderr.  Exit codes: 0 all was done, 1 something could not be done (the message
says what), 2 the command was misused, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpq_analysis.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


app = typer.Typer(
    name="fpq-analyze",
    help="Curvature of quantized networks: train FPQ and its baselines, measure Hessian traces, draw the figures.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(error: Exception) -> None:
    width = min(100, _columns())
    _say(textwrap.fill(f"Error: {error}", width=width, break_long_words=False, break_on_hyphens=False))


def _columns() -> int:
    return shutil.get_terminal_size((80, 24)).columns


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions into a paragraph and an exit code; FPQ_DEBUG=1 shows the traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            _say("Stopped. What was finished is kept; the same command goes on from there (training: add --resume).")
            raise typer.Exit(130) from None
        except UserError as error:
            _fail(error)
            raise typer.Exit(1) from None
        except Exception as error:
            if os.environ.get("FPQ_DEBUG"):
                raise
            _fail(
                UserError(
                    f"{type(error).__name__}: {error} -- this is a fault of the program, or of the machine it ran on. "
                    "Run again with FPQ_DEBUG=1 for the traceback, and please report it."
                )
            )
            raise typer.Exit(1) from None

    return run


Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
DataRoot = Annotated[str | None, typer.Option(help="Folder of the data set (not for digits).")]
Json = Annotated[bool, typer.Option("--json", help="Rows as JSON lines on stdout.")]


def _check_version(value: bool) -> None:
    if value:
        from fpq_analysis import __version__

        print(f"fpq-analyze {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_check_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@_guarded
def train(
    method: Annotated[str, typer.Option(help="fp, lsq or fpq.")] = "fp",
    model: Annotated[
        str, typer.Option(help="resnet20, resnet18, mobilenet_v2 or package.module:factory.")
    ] = "resnet20",
    data: Annotated[str, typer.Option(help="digits, cifar10, cifar100 or imagefolder.")] = "digits",
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option(help="Fetch CIFAR into --data-root.")] = False,
    image_size: Annotated[int | None, typer.Option(help="Resize imagefolder images to this side.")] = None,
    bits: Annotated[str | None, typer.Option(help="WxAy, for example W4A4 (weights, activations).")] = None,
    init: Annotated[str | None, typer.Option(help="Float run that is start and teacher.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: a new one in checkpoints/.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 256,
    lr: Annotated[float, typer.Option(help="Learning rate at the start of the cosine.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Of weights, not of step sizes.")] = 5e-4,
    augment: Annotated[bool, typer.Option(help="Random crop and flip (the paper most likely had none).")] = True,
    sfp_p: Annotated[float, typer.Option(help="FPQ: probability of noise at a convolution; 0: off.")] = 0.1,
    csd_weight: Annotated[float, typer.Option(help="FPQ: weight of distillation; 0: off.")] = 1.0,
    csd_reduction: Annotated[str, typer.Option(help="FPQ: mean, or the paper's literal sum.")] = "mean",
    weight_calibration: Annotated[str, typer.Option(help="First scales of weights: mse or minmax.")] = "mse",
    act_calibration: Annotated[str, typer.Option(help="First scales of inputs: mse or minmax.")] = "mse",
    calibration_images: Annotated[int, typer.Option(help="Training images for the first scales.")] = 100,
    bf16: Annotated[bool, typer.Option("--bf16", help="Networks under bfloat16 autocast.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, shuffles, augmentation and noise.")] = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw an existing run away.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
    json: Json = False,
) -> None:
    """Train one network, with a checkpoint before training and after every epoch.

    [bold]Examples[/bold]

      fpq-analyze train --epochs 15 --lr 0.1 --out checkpoints/fp

      fpq-analyze train --method fpq --bits W4A4 --init checkpoints/fp --epochs 15
    """
    options = {k: v for k, v in locals().items() if k not in _NOT_CONFIG}
    from fpq_analysis.training import TrainConfig
    from fpq_analysis.training import train as run_training

    config = TrainConfig(**options)
    run = out or Path("checkpoints") / config.name
    if dry_run:
        _say(f"Would train {run}:")
        for key, value in options.items():
            _say(f"  {key} = {value}")
        return
    frame = run_training(config, run, device=device, download=download, resume=resume, overwrite=overwrite, log=_say)
    if json:
        _print_json(frame)
    last = frame.iloc[-1]
    _say(f"Done: {run}, epoch {int(last['epoch'])}, test accuracy {100 * last['test_accuracy']:.2f} %")


_NOT_CONFIG = ("download", "out", "device", "resume", "overwrite", "dry_run", "json")


@app.command()
@_guarded
def hessian(
    ckpt_dir: Annotated[Path, typer.Option(help="A run, or a folder of runs.")] = Path("checkpoints"),
    definition: Annotated[str, typer.Option(help="dequantized, latent or float.")] = "dequantized",
    method: Annotated[str, typer.Option(help="auto, exact, sampled or hutchinson.")] = "auto",
    engine: Annotated[str, typer.Option(help="builtin, or pyhessian as a cross-check.")] = "builtin",
    n_data: Annotated[int, typer.Option(help="Training images to measure on.")] = 1024,
    tol: Annotated[float | None, typer.Option(help="Wanted relative error from probes (hutchinson, sampled).")] = None,
    n_probes: Annotated[int, typer.Option(help="Probes without --tol (hutchinson, pyhessian).")] = 100,
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
    probe = HessianTrace(definition, "pyhessian" if engine == "pyhessian" else method, tol, n_probes, n_labels)
    todo = measurement.plan(ckpt_dir, probe, n_data=n_data, seed=seed, overwrite=overwrite)
    _say(f"{len(todo.done)} done, {len(todo.jobs)} to do" + (f", {len(todo.faults)} unreadable" if todo.faults else ""))
    where: dict[str, Any] = {"n_data": n_data, "seed": seed, "device": device, "data_root": data_root, "model": model}
    if dry_run:
        _print_forecast(measurement.forecast(todo, probe, **where))
        return
    faults: list[UserError] = []
    frame = measurement.carry_out(todo, probe, on_fault=lambda path, fault: faults.append(fault), **where)
    if json:
        _print_json(frame)
    else:
        _print_traces(frame)
    _draw_figure5(frame, figures)
    for fault in faults:
        _fail(fault)
    if faults:
        total = len(todo.jobs) + len(todo.done) + len(todo.faults)
        _say(f"{len(faults)} of {total} checkpoints could not be measured.")
    unreached = int((frame["status"] == "tolerance not reached").sum())
    if unreached:
        _say(f"{unreached} measurements did not reach --tol {tol}; their errors stand beside them.")
    if faults or unreached:
        raise typer.Exit(1)


@app.command()
@_guarded
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("checkpoints/demo"),
    figures: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("figures"),
    device: Device = "auto",
) -> None:
    """The whole job on 1,797 real digits that come with the package: train, measure, table, figure.

    A float ResNet-20, then LSQ and FPQ at W4A4 and W2A4 from it; the exact Hessian trace of every epoch. Minutes on two
    cores, no download. Stopped, it goes on where it was.

    [bold]Example[/bold]

      fpq-analyze demo
    """
    from fpq_analysis.demo import run_demo

    frame = run_demo(out, device=device, log=_say)
    _print_traces(frame)
    _draw_figure5(frame, figures)


def _draw_figure5(frame: pd.DataFrame, folder: Path) -> None:
    from fpq_analysis.plots import caption5, figure5, save
    from fpq_analysis.plots.figure5 import totals

    if totals(frame).empty:
        return
    written = save(figure5(frame), folder / "figure5", caption5(frame))
    _say("Figure 5: " + ", ".join(str(path) for path in written))


def _print_json(frame: pd.DataFrame) -> None:
    frame = frame.drop(columns="samples", errors="ignore")
    print(frame.to_json(orient="records", lines=True), end="")


def _print_traces(frame: pd.DataFrame) -> None:
    """The whole-network traces, a row a checkpoint; of long runs the first, the last and some between."""
    from rich.console import Console
    from rich.table import Table

    from fpq_analysis.comparison import against_baseline, number
    from fpq_analysis.plots.figure5 import totals

    rows = totals(frame)
    if rows.empty:
        return
    clipped = frame[frame["quantity"] == "clipped_fraction"].set_index("key")["value"]
    columns = {
        "Run": "left",
        "Epoch": "right",
        "Trace": "right",
        "± 95 %": "right",
        "Clipped": "right",
        "Method": "left",
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in columns.items():
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for _, run in rows.groupby(["run", "definition", "estimator", "n_data", "seed"], sort=False):
        run = run.sort_values("epoch")
        step = max(1, (len(run) - 1) // 4)
        for i in sorted({*range(0, len(run), step), len(run) - 1}):
            row = run.iloc[i]
            error = row["sem_data"] if row["sem_data"] == row["sem_data"] else row["sem"]
            how = row["estimator"] if row["definition"] == "dequantized" else f"{row['estimator']}, {row['definition']}"
            share = f"{100 * clipped.get(row['key'], 0.0):.1f} %"
            table.add_row(row["run"], str(row["epoch"]), number(row["value"], 4), number(1.96 * error, 2), share, how)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else max(80, _columns())).print(table)
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
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in frame.columns:
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    Console(width=None if sys.stdout.isatty() else max(80, _columns())).print(table)


def main() -> None:
    """Entry point of `fpq-analyze`."""
    app()


if __name__ == "__main__":
    main()
