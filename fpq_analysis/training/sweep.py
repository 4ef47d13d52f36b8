"""Sweeps: a TOML file describes a run or a grid of runs; what is not yet done is done, one run after the other.

    out = "checkpoints/study"          # where the runs go; default: checkpoints/<name of the file>

    [run]                              # what all runs share: any field of TrainConfig, one value each
    data = "cifar10"
    epochs = 200

    [teacher]                          # where the shared float runs differ from [run]
    lr = 0.1

    [[grid]]                           # lists multiply, sections add up
    method = ["lsq", "fpq"]
    model = ["resnet18", "mobilenet_v2"]
    bits = ["W4A4", "W2A4"]
    seed = [0, 1, 2]

A quantized run starts from the float run of its model, data and seed, which is trained first and once (`seed` in
[teacher]: one for all seeds; `init` in [run] or a grid: a float run made elsewhere).  A run's folder is named after its
model, data, method, bits and seed, and after every other field in which it differs from [run]; so files with one `out`
and equal settings share their runs.  Paths are seen from where the command is called, as on the command line.
"""

from __future__ import annotations

import itertools
import re
import statistics
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pandas as pd

from fpq_analysis.choices import DATASETS, check_model_name
from fpq_analysis.data import Dataset, load_dataset
from fpq_analysis.errors import UserError, did_you_mean, explained
from fpq_analysis.methods import METHODS
from fpq_analysis.runs import Run
from fpq_analysis.text import duration, parse_shard
from fpq_analysis.training.config import TrainConfig
from fpq_analysis.training.loop import train
from fpq_analysis.training.resume import check_teacher, last_finished_epoch

SECTIONS = ("out", "run", "teacher", "grid")
FIELDS = tuple(field.name for field in fields(TrainConfig))
# What a teacher takes over from its student, and what else decides a float run; the other fields are left at their
# defaults there, so that sweeps that differ in them share the teacher.
SHARED = ("data", "data_root", "image_size", "model", "seed")
OPTIMISER = ("epochs", "batch_size", "lr", "momentum", "weight_decay", "augment", "bf16")
# Where things lie is not what a run is: a finished run that was moved is still finished.
LOCATIONS = ("init", "data_root")
DONE, STARTED, TO_DO = "done", "started", "to do"
FAILED, WAITS = "failed", "waits for its teacher"


@dataclass(frozen=True)
class Sweep:
    """What a file asks for.

    Attributes:
        out: folder of the runs.
        runs: name of the folder to config; float runs first.
        teachers: name of a quantized run to that of its float run, where that is one of `runs`.
    """

    out: Path
    runs: dict[str, TrainConfig]
    teachers: dict[str, str]

    def shard(self, i: int, n: int) -> list[str]:
        """Names of the i-th of n parts, i from 1.

        Float runs are dealt out in turn.  Quantized runs go with their teacher where every part has one, and are dealt
        out in turn otherwise.
        """
        floats = [name for name, config in self.runs.items() if config.bits is None]
        owner = {name: k % n for k, name in enumerate(floats)}
        together = len(set(self.teachers.values())) >= n
        for k, name in enumerate(name for name in self.runs if name not in owner):
            owner[name] = owner[self.teachers[name]] if together and name in self.teachers else k % n
        return [name for name in self.runs if owner[name] == i - 1]


def read_sweep(path: str | Path, *, out: str | Path | None = None) -> Sweep:
    """The sweep a TOML file describes.

    Args:
        out: in place of the file's own `out`.

    Raises:
        UserError: if the file is missing or no TOML, or a section, key or value in it is unknown or of the wrong kind.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"No file '{path}'. The sweeps that come with the program are in configs/.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read: {error}. --config wants a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"'{path}' is not TOML: {error}. Put text in quotes and lists in [ ].") from error
    try:
        return parse_sweep(document, out or document.get("out", f"checkpoints/{path.stem}"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_sweep(document: dict[str, Any], out: str | Path) -> Sweep:
    """The sweep of a parsed file; `out` is the folder of its runs.

    Raises:
        UserError: see `read_sweep`.
    """
    _known("section", document, SECTIONS, "the file")
    if not isinstance(out, str | Path):
        raise UserError(f"out is {out!r}, and must be the name of a folder, in quotes.")
    out = Path(out)
    shared = _values(document, "run", FIELDS)
    teacher = _values(document, "teacher", ("seed", *OPTIMISER))
    grids = document.get("grid", [{}])
    grids = [grids] if isinstance(grids, dict) else grids
    if not isinstance(grids, list) or not all(isinstance(section, dict) for section in grids):
        raise UserError("'grid' must be a section: a line [[grid]], and its keys below.")
    runs: dict[str, TrainConfig] = {}
    students: dict[str, TrainConfig] = {}
    teachers: dict[str, str] = {}
    for section in grids:
        for cell in _cells(section):
            wanted = shared | cell
            if not METHODS[wanted.get("method", "fp")].quantized:
                _enter(runs, _float_config(shared | teacher | cell), shared | teacher)
                continue
            if "init" in wanted:
                _enter(students, TrainConfig(**wanted), shared)
                continue
            start = shared | {key: wanted[key] for key in SHARED if key in wanted} | teacher | {"method": "fp"}
            source = _enter(runs, _float_config(start), shared | teacher)
            name = _enter(students, TrainConfig(**wanted, init=str(out / source)), shared)
            teachers[name] = source
    return Sweep(out, runs | students, teachers)


def sweep_status(sweep: Sweep, names: list[str] | None = None) -> pd.DataFrame:
    """A row a run: what it is, how far it is, and how long the rest will take.

    Args:
        names: of these runs only.

    Returns:
        Columns run, model, data, method, bits, seed, epochs, epoch (finished so far), status, test_accuracy (fraction,
        at that epoch), seconds (of training so far), seconds_left (at the pace of the nearest runs with finished epochs
        in the sweep: of the same model, data and method, or else of the same model and data; NaN where there is none).

    Raises:
        UserError: if a folder holds something else, or a run with other settings or from another teacher.
    """
    logs = {name: _finished_rows(sweep, name) for name in sweep.runs}
    rows = []
    for name in names if names is not None else sweep.runs:
        config, log = sweep.runs[name], logs[name]
        epoch = log[-1]["epoch"] if log else 0
        pace = _pace(sweep, logs, config)
        about = {key: getattr(config, key) for key in ("model", "data", "method", "bits", "seed", "epochs")}
        rows.append(
            {
                "run": name,
                **about,
                "epoch": epoch,
                "status": DONE if epoch == config.epochs else STARTED if log else TO_DO,
                "test_accuracy": log[-1]["test_accuracy"] if log else None,
                "seconds": sum(row.get("seconds", 0.0) for row in log),
                "seconds_left": 0.0 if epoch == config.epochs else pace * (config.epochs - epoch),
            }
        )
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype({"test_accuracy": float, "seconds_left": float})


_COLUMNS = (
    *("run", "model", "data", "method", "bits", "seed", "epochs"),
    *("epoch", "status", "test_accuracy", "seconds", "seconds_left"),
)


def run_sweep(
    sweep: Sweep | str | Path,
    *,
    shard: str | None = None,
    device: str = "auto",
    download: bool = False,
    executor: Executor | None = None,
    tensorboard: bool = False,
    log: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Do what is not yet done of a sweep, or of the file of one: finished runs are skipped, started ones go on.

    A run that fails (a diverged loss) is reported, and the others go on; those whose teacher is not there are left.

    Args:
        shard: `i/N`, the i-th of N parts, see `Sweep.shard`; None for all.
        device, download: as for `train`.
        executor: where runs are trained, all at a time whose teacher is there; None: here, one by one.
        tensorboard: as for `train`.
        log: called with lines of text.

    Returns:
        `sweep_status` afterwards, with the status `failed` or `waits for its teacher` where that is so.

    Raises:
        UserError: for bad input, see `read_sweep` and `sweep_status`, or if the data are missing.
    """
    sweep = sweep if isinstance(sweep, Sweep) else read_sweep(sweep)
    names = sweep.shard(*parse_shard(shard)) if shard else list(sweep.runs)
    failed: set[str] = set()
    flying: dict[Future[None], str] = {}
    held: tuple[Any, Dataset] | None = None  # the data set of the last run
    while True:
        # Looked up anew before every run: another machine may have finished a teacher since.
        status = sweep_status(sweep, names)
        log(summary(status))
        left = [name for name in status.loc[status["status"] != DONE, "run"] if name not in failed]
        ready = [name for name in left if name not in flying.values() and _teacher_is_there(sweep, name)]
        if not ready and not flying:
            trouble = dict.fromkeys(left, WAITS) | dict.fromkeys(failed, FAILED)
            status["status"] = [trouble.get(name, s) for name, s in zip(status["run"], status["status"], strict=True)]
            return status
        for name in ready if executor else ready[:1]:
            config = sweep.runs[name]
            source = (config.data, config.data_root, config.image_size)
            if held is None or held[0] != source:  # with an executor, too: missing data are one error
                held = source, load_dataset(*source[:2], download=download, image_size=source[2])
            log(f"{name}:" if executor is None else f"{name} is handed out")
            try:
                if executor is None:
                    how: dict[str, Any] = {"device": device, "resume": True, "tensorboard": tensorboard}
                    train(config, sweep.out / name, dataset=held[1], log=log, **how)
                else:
                    flying[executor.submit(_train_elsewhere, config, sweep.out / name, device, tensorboard)] = name
            except UserError as fault:
                failed.add(name)
                log(f"{name} failed: {fault}")
        for future in wait(flying, return_when=FIRST_COMPLETED).done:
            name = flying.pop(future)
            try:
                future.result()
                if _finished_epoch(sweep, name) != sweep.runs[name].epochs:
                    raise UserError(f"it was trained, but not all of it is in '{sweep.out}'. Is that seen everywhere?")
            except Exception as error:
                failed.add(name)
                log(f"{name} failed: {explained(error)}")


def _train_elsewhere(config: TrainConfig, run: Path, device: str, tensorboard: bool) -> None:
    """A run of a sweep, in another process; its lines say which it is."""
    how: dict[str, Any] = {"device": device, "resume": True, "tensorboard": tensorboard}
    train(config, run, log=lambda line: print(f"{run.name}: {line}", file=sys.stderr), **how)


def summary(status: pd.DataFrame) -> str:
    """How much is done and how long the rest takes, in a line."""
    todo = status[status["status"] != DONE]
    text = f"{len(status)} run{'s' if len(status) != 1 else ''}: {len(status) - len(todo)} done, {len(todo)} to do"
    if todo.empty:
        return text
    unknown = int(todo["seconds_left"].isna().sum())
    known = todo["seconds_left"].sum()
    if unknown == len(todo):
        return f"{text}; how long that takes shows once an epoch is done"
    return f"{text}, about {duration(known)} left" + (f" and {unknown} of unknown length" if unknown else "")


def _values(document: dict[str, Any], section: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The keys and checked values of [run] or [teacher]."""
    values = document.get(section, {})
    if not isinstance(values, dict):
        raise UserError(f"'{section}' must be a section: a line [{section}], and its keys below.")
    _known("key", values, known, f"[{section}]")
    for key, value in values.items():
        if isinstance(value, list):
            raise UserError(f"{key} in [{section}] is a list. Lists make grids: put it into a [[grid]] section.")
    return {key: _checked(key, value, f"[{section}]") for key, value in values.items()}


def _cells(section: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the lists of a [[grid]] section; all of the first seed's come first."""
    _known("key", section, FIELDS, "[[grid]]")
    axes = {
        key: [_checked(key, one, "[[grid]]") for one in (value if isinstance(value, list) else [value])]
        for key, value in section.items()
    }
    for key, values in axes.items():
        if not values:
            raise UserError(f"{key} in [[grid]] is an empty list, so the grid has no runs.")
    keys = sorted(axes, key=lambda key: key != "seed")
    for combination in itertools.product(*(axes[key] for key in keys)):
        yield dict(zip(keys, combination, strict=True))


def _known(what: str, given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"Unknown {what} '{key}' in {where}{did_you_mean(key, known)}. Known: {', '.join(known)}.")


def _checked(key: str, value: Any, where: str) -> Any:
    """`value` if it is of the kind that the field `key` wants and, where its values have names, a known one."""
    hint = get_type_hints(TrainConfig)[key]
    kinds = get_args(hint) or (hint,)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        value = float(value)
    # To Python a truth value is a whole number, to a reader it is not.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
        wanted = " or ".join(names[kind] for kind in kinds if kind in names)
        raise UserError(f"{key} in {where} is {value!r}, and must be {wanted}.")
    if key == "model":
        check_model_name(value)
    names_of = {"method": METHODS, "data": DATASETS}
    if key in names_of and value not in names_of[key]:
        near = did_you_mean(value, names_of[key])
        raise UserError(f"Unknown {key} '{value}' in {where}{near}. Known: {', '.join(names_of[key])}.")
    return value.upper() if key == "bits" else value


def _float_config(settings: dict[str, Any]) -> TrainConfig:
    kept = (*SHARED, *OPTIMISER, "method")
    return TrainConfig(**{"method": "fp", **{key: value for key, value in settings.items() if key in kept}})


def _enter(runs: dict[str, TrainConfig], config: TrainConfig, shared: dict[str, Any]) -> str:
    """Put `config` into `runs` under its name, which is given back."""
    plain = asdict(TrainConfig()) | shared
    in_name = {"model", "data", "method", "quantizer", "bits", "seed", "init" if "init" not in shared else ""}
    odd = {key: value for key, value in asdict(config).items() if key not in in_name and value != plain[key]}
    # A float run has no use for the fields that `_float_config` leaves out.
    if config.bits is None:
        odd = {key: value for key, value in odd.items() if key in (*SHARED, *OPTIMISER)}
    name = "-".join([config.name, *(re.sub(r"[^\w.+-]", "_", f"{key}{_short(value)}") for key, value in odd.items())])
    if runs.setdefault(name, config) != config:
        raise UserError(f"Two different runs of the sweep would share the folder '{name}'. Put them into two files.")
    return name


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else Path(value).name if isinstance(value, str) else str(value)


def _finished_epoch(sweep: Sweep, name: str) -> int:
    """The last epoch of a run that counts as done, `resume.NOTHING` before the first."""
    config, run = sweep.runs[name], sweep.out / name
    if (run / "run.json").exists():
        before = Run(run).config
        config = replace(config, **{key: before[key] for key in LOCATIONS if before.get(key) is not None})
    return last_finished_epoch(config, run, resume=True, overwrite=False)


def _teacher_is_there(sweep: Sweep, name: str) -> bool:
    """Whether the run `name` can start: its teacher is finished, or is no part of the sweep."""
    teacher = sweep.teachers.get(name)
    return teacher is None or _finished_epoch(sweep, teacher) == sweep.runs[teacher].epochs


def _finished_rows(sweep: Sweep, name: str) -> list[dict[str, Any]]:
    """The rows of `train.jsonl` up to the last epoch that counts as done."""
    epoch, run = _finished_epoch(sweep, name), sweep.out / name
    if epoch == sweep.runs[name].epochs and name in sweep.teachers and _teacher_is_there(sweep, name):
        teacher = Run(sweep.out / sweep.teachers[name]).manifest
        check_teacher(run, teacher[max(teacher)])
    return [row for row in Run(run).rows if row["epoch"] <= epoch]


def _pace(sweep: Sweep, logs: dict[str, list[dict[str, Any]]], config: TrainConfig) -> float:
    """Seconds an epoch, from the epochs of like runs; NaN without any."""
    for alike in (("model", "data", "method"), ("model", "data")):
        seconds = [
            row["seconds"]
            for name, log in logs.items()
            if all(getattr(sweep.runs[name], key) == getattr(config, key) for key in alike)
            for row in log
            if "seconds" in row
        ]
        if seconds:
            return statistics.median(seconds)
    return float("nan")
