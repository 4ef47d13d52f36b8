"""What all commands share: the application, errors as paragraphs, options, tables."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fpq_analysis.choices import check_data_name, check_model_name
from fpq_analysis.cli.options import option, with_options
from fpq_analysis.errors import UserError, explained
from fpq_analysis.progress import show_progress
from fpq_analysis.quantspec import QuantSpec
from fpq_analysis.references import find
from fpq_analysis.text import counted, printable

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from fpq_analysis.runs.foreign import ForeignRuns


class _Commands(TyperGroup):
    """Commands whose errors say where folders stand, which some take by their place and others behind an option."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:  # a usage error of click's, which typer may bring along itself
            message, within = getattr(error, "message", ""), getattr(error, "ctx", None)
            options = {name for one in getattr(getattr(within, "command", None), "params", ()) for name in one.opts}
            if "unexpected extra argument" in message and "--ckpt-dir" in options:
                error.message = f"{message}. A folder of runs is given as --ckpt-dir FOLDER."  # type: ignore[attr-defined]
            elif message.endswith("--ckpt-dir") and within is not None:
                error.message = f"{message}. The folder is given without it: {within.command_path} FOLDER ..."  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    name="fpq-analyze",
    cls=_Commands,
    help="Curvature of quantized networks: train FPQ and its baselines, measure Hessians, compare, draw the figures.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def log(text: str) -> None:
    """A line on stderr."""
    print(printable(text, keep="\n"), file=sys.stderr, flush=True)


def echo(text: str = "") -> None:
    """A line of results, on stdout."""
    print(printable(text, keep="\n"))


def fail(error: Exception | str) -> None:
    """An error as a paragraph on stderr."""
    width = min(100, columns())
    text = printable(f"Error: {error}", keep=" \n")
    log(textwrap.fill(text, width=width, break_long_words=False, break_on_hyphens=False))


FILE = "\0"  # stands for a file's name in an error that is the same of several


def fail_all(faults: Mapping[Path, Exception]) -> None:
    """Each error once, with the files it is about; exit with 1 if there is any."""
    files: dict[str, list[Path]] = {}
    for path, fault in faults.items():
        files.setdefault(str(fault).replace(f"'{path}'", FILE), []).append(path)
    for text, paths in files.items():
        first, others = f"'{paths[0]}'", len(paths) - 1
        if FILE in text:
            fail(text.replace(FILE, first) + (f" The same holds of {counted(others, 'more file')}." if others else ""))
        else:
            fail(f"{first}{f' and {others} more' if others else ''}: {text}")
    if faults:
        raise typer.Exit(1)


def columns() -> int:
    """Width of the terminal."""
    return shutil.get_terminal_size((80, 24)).columns


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions into a paragraph and an exit code; FPQ_DEBUG=1 shows the traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with show_progress():  # in a log, too
                command(*args, **kwargs)
        except (typer.Exit, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            log("Stopped. What was finished is kept; the same command goes on from there")
            log("(training: with --resume; measuring: without --overwrite).")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of the output has seen enough: typer ends quietly
            raise
        except Exception as error:
            if os.environ.get("FPQ_DEBUG") and not isinstance(error, UserError):
                raise
            fail(explained(error))
            raise typer.Exit(1) from None

    return run


CkptDir = Annotated[Path, typer.Option(help="A run, or a folder of runs.")]
NData = Annotated[int, typer.Option(help="Samples to measure on.")]
Epochs = Annotated[str, typer.Option(help="Epochs of each run: all, last, or 1,5,10.")]
Seed = Annotated[int, typer.Option(help="Seed of the sample and of everything random.")]
Model = Annotated[str | None, typer.Option(help="For your own network: package.module:factory.")]
Loss = Annotated[str, typer.Option(help="cross_entropy, squared_error, ..., or package.module:name (docs/losses.md).")]
Figures = Annotated[Path, typer.Option(help="Where the figures go.")]
Records = Annotated[Path | None, typer.Option(help="Where measurements are kept. Default: in the runs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Measure again what was measured.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the jobs with time and memory, and stop.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
DataRoot = Annotated[str | None, typer.Option(help="Folder of the data set (not for digits).")]
Jobs = Annotated[str, typer.Option(help="Processes at a time: a number, or auto.")]
Engine = Annotated[str | None, typer.Option("--executor", help="Where the tasks run: docs/scale.md.")]
ShardOf = Annotated[str | None, typer.Option("--shard", help="i/N: the share of the i-th of N machines.")]
Json = Annotated[bool, typer.Option("--json", help="Rows as JSON lines on stdout.")]


FOREIGN = "Checkpoints of another program, with --model (docs/tutorial.md)"
HOW_TO_READ = {  # name: type, default, help
    "data": (str | None, None, "digits, cifar10, cifar100, imagefolder; yours: package.module:function, FILE.npz."),
    "image_size": (int | None, None, "Side to which images are resized."),
    "normalize": (str, "data", "data (its own statistics), none, half, imagenet, or MEANS/STDS."),
    "bits": (str | None, None, "WxAy, for a network quantized by quantize()."),
    "transform": (str | None, None, "Applied to your data's inputs: package.module:function."),
    "forward": (str | None, None, "How the network is called: package.module:function of (model, inputs)."),
}


def check_there(checkpoint: Path) -> None:
    """Raise `UserError` if there is no such file or folder, or nothing in it: before torch is loaded."""
    if not checkpoint.exists():
        raise UserError(f"No checkpoint '{checkpoint}'.")
    if checkpoint.is_dir() and next(checkpoint.rglob("*.*"), None) is None:
        raise UserError(f"'{checkpoint}' holds no checkpoint (epoch_0000.pt, ...). Give a run's folder, or a file.")


def check_model(name: str) -> None:
    """Raise `UserError` unless it is the name of a network that is there; for one of the user's own before torch is."""
    check_model_name(name)
    if ":" in name:
        find(name, "model")


def reads_foreign(*folders: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that say how checkpoints of another program are to be read.

    With --data, its arguments `folders` come to it as `ForeignRuns`, which stand for the folder wherever a checkpoint
    is read.  The command has `model` and `data_root` among its own options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**options: Any) -> None:
            reading = {name: options.pop(name) for name in HOW_TO_READ}
            for folder in folders:
                if reading["data"] is not None and not options.get("through") and not options[folder].exists():
                    raise UserError(f"There is no '{options[folder]}'. A file or folder of checkpoints is wanted.")
                options[folder] = _source(options[folder], options["model"], options["data_root"], **reading)
            command(**options)

        return with_options(run, [option(name, *rest, FOREIGN) for name, rest in HOW_TO_READ.items()])

    return decorate


def _source(
    folder: Path,
    model: str | None,
    data_root: str | None,
    *,
    data: str | None,
    image_size: int | None,
    normalize: str,
    bits: str | None,
    transform: str | None,
    forward: str | None,
) -> Path | ForeignRuns:
    if data is None:
        if (image_size, normalize, bits, transform, forward) != (None, "data", None, None, None):
            raise UserError(
                "--image-size, --normalize, --bits, --transform and --forward are for checkpoints of another program, "
                "whose data must be named "
                "too: --data NAME. A run of fpq-analyze says these itself."
            )
        return folder
    if model is None:
        raise UserError(
            "--data is for checkpoints of another program, whose network must be named too: --model "
            "package.module:factory. A run of fpq-analyze says both itself."
        )
    check_model(model)
    check_data_name(data)
    quant = QuantSpec.parse(bits) if bits else None
    from fpq_analysis.runs.foreign import ForeignRuns, foreign_runs, left_out

    for path in [path for run in foreign_runs(folder) for path in left_out(run)]:
        log(f"'{path}' is left out: it has no number in its name, as others beside it have.")
    return ForeignRuns(folder, model, data, data_root, image_size, normalize, quant, transform, forward)


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


def print_json(frame: pd.DataFrame) -> None:
    """Rows as JSON lines on stdout, without the long per-sample columns."""
    frame = frame.drop(columns="samples", errors="ignore")
    if len(frame):  # of nothing pandas makes an empty line
        print(frame.to_json(orient="records", lines=True), end="")


def new_table(columns: dict[str, str] | list[tuple[str, str]]) -> Table:
    """A plain table; `columns` are headings with `left` or `right`.  Cells that are `str` are shown as they are."""
    from rich.table import Table
    from rich.text import Text

    class Plain(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            plain = (Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells)
            super().add_row(*plain, **options)

    table = Plain(box=None, pad_edge=False, header_style="bold")
    for name, justify in columns.items() if isinstance(columns, dict) else columns:
        table.add_column(Text(printable(name)), justify=justify)  # type: ignore[arg-type]
    return table


def print_table(table: Table) -> None:
    """To stdout, at the terminal's width; 80 columns or more into a pipe."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else max(80, columns())).print(table)


def main() -> None:
    """Entry point of `fpq-analyze`."""
    for stream in (sys.stdout, sys.stderr):  # characters an encoding lacks, such as ±, are escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Torch's threads spin while they wait for each other, and beside other work on the same cores those that are waited
    # for do not run meanwhile: small networks took up to thirty times as long.  With GNU's OpenMP they now spin for
    # microseconds and then sleep, which costs nothing on an idle machine; never to spin (OMP_WAIT_POLICY=passive) costs
    # a quarter there.  It is read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        app()
    else:  # the first of the ranks that torchrun started; the others measure their shares of the samples
        from fpq_analysis.ranks.leading import launched

        code: Any = 0
        try:
            launched(app)
        except SystemExit as end:
            code = end.code or 0
        except UserError as error:
            if os.environ["RANK"] == "1":  # one of those that are left is enough
                fail(error)
            code = 1
        except KeyboardInterrupt:
            code = 130
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        # Gloo's threads now and then abort a process that takes itself down in the usual way, when all is done.
        os._exit(code if isinstance(code, int) else 1)
