"""A run's folder, as far as it is known without reading weights (and without torch).

<run>/run.json             config, versions, what the data set is
<run>/epoch_0000.pt ...    before training and after every epoch, see `checkpoint.py`
<run>/manifest.json        SHA-256, size and time of each checkpoint, see `stamps.py`
<run>/train.jsonl          a row an epoch
<run>/resume.pt            optimiser state, for going on after a kill; replaced every epoch
<run>/records/             what was measured, see `records/table.py`
<run>/records/monitor.json a monitor measured in the training itself; there need be no checkpoint files
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fpq_analysis.errors import UserError, going_on
from fpq_analysis.files import read_json, read_jsonl
from fpq_analysis.runs.stamps import file_hash, read_stamps
from fpq_analysis.schema import RunFile, TrainRow, check

MONITORED = "records/monitor.json"
CHECKPOINT_NAME = re.compile(r"epoch_(\d{4,})\.pt")
SUFFIXES = (".pt", ".pth", ".pt.tar", ".pth.tar", ".ckpt", ".safetensors")  # of checkpoints of any program
FOREIGN_OPTIONS = "--model package.module:factory --data NAME"  # for files of another program, see `foreign.py`
# Not settings of a run: where things lay on one machine.
PLACES = ("init", "data_root")


@dataclass(frozen=True)
class Header:
    """What is known of a checkpoint without reading its weights: enough for the key of its measurements.

    Attributes:
        epoch: finished epochs.
        sha256: of the file.
        model: the network's name, or the function that makes it.
        data: fingerprint of the training data.
        quantized: whether the network has quantizers.
        init: the run whose network this one was started from, if any.
        stated: what the user stated because the file lacks it; empty for our own files.
    """

    epoch: int
    sha256: str
    model: str | Callable[..., Any]
    data: str
    quantized: bool
    init: str | None
    stated: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A training run.  What its folder holds is read, checked and kept when it is first asked for.

    All properties raise `UserError` if the file that they are read from is damaged.

    Attributes:
        path: the folder.
        name: what a reader calls it.
        described: of a run of another program, which has no `run.json`, what is known of it in its form.
    """

    path: Path
    name: str = ""
    described: dict[str, Any] | None = None

    @cached_property
    def about(self) -> dict[str, Any]:
        """The content of `run.json`, checked against `schema.RunFile`."""
        if self.described is not None:
            return self.described
        path = self.path / "run.json"
        if not path.exists():
            raise UserError(f"'{self.path}' is not a run: it has no run.json. 'fpq-analyze train' makes one.")
        content = read_json(path)
        check(RunFile, content, f"'{path}'")
        return content

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `train.jsonl`, one an epoch, in order: of repeated ones the newest."""
        path = self.path / "train.jsonl"
        rows: dict[int, dict[str, Any]] = {}
        for row in read_jsonl(path):
            check(TrainRow, row, f"'{path}'")
            rows[row["epoch"]] = row
        return [rows[epoch] for epoch in sorted(rows)]

    @cached_property
    def manifest(self) -> dict[str, str]:
        """File name to SHA-256; empty if there is no manifest."""
        return {name: stamp.sha256 for name, stamp in read_stamps(self.path / "manifest.json").items()}

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """Epoch to file, in order of epochs; empty if there is no such folder."""
        files = self.path.iterdir() if self.path.is_dir() else ()
        found = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in files)
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    @property
    def teacher(self) -> Path | None:
        """The float checkpoint that it started from, where it was or beside this run; None if it started from none.

        Raises:
            UserError: if it is not there, or no longer the same.
        """
        init, wanted = self.config.get("init"), self.teacher_sha256
        if init is None or wanted is None:
            return None
        for folder in (Path(init), self.path.parent / Path(init).name):
            other = Run(folder)
            for path in other.checkpoints.values():
                if other.manifest.get(path.name, wanted) == wanted and file_hash(path) == wanted:
                    return path
        raise UserError(
            f"The float network that '{self.path}' started from is not in '{init}', nor in "
            f"'{self.path.parent / Path(init).name}' (SHA-256 {wanted[:12]}...). Move its run there, or run the "
            "command in the folder where it was trained."
        )

    def header(self, path: Path) -> Header | None:
        """The header of one of its checkpoints, from `run.json` and the file's name; None if these do not say enough.

        Raises:
            UserError: if the file is missing, or is not the one that the manifest names.
        """
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match is None or not (self.path / "run.json").exists():
            return None
        config, data = self.config, self.data
        quantized = config["bits"] is not None
        return Header(int(match[1]), file_hash(path), config["model"], data["fingerprint"], quantized, config["init"])

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the training."""
        return dict(self.about["config"])

    @property
    def data(self) -> dict[str, Any]:
        """What the data set is."""
        return dict(self.about["data"])

    @property
    def versions(self) -> dict[str, str]:
        """Of what the numbers depend on, when it was trained."""
        return dict(self.about.get("versions", {}))

    @property
    def started(self) -> str:
        """When: `2025-03-16T09:30:00+00:00`, or nothing."""
        return str(self.about.get("started", ""))

    @property
    def teacher_sha256(self) -> str | None:
        """Of the checkpoint that it started from."""
        return self.about.get("teacher")

    @property
    def method(self) -> str:
        """Key of the training method."""
        return str(self.config.get("method", ""))

    @property
    def model(self) -> str:
        """Name of the network."""
        return str(self.config.get("model", ""))

    @property
    def dataset(self) -> str:
        """Name of the data."""
        return str(self.data.get("name", self.config.get("data", "")))

    @property
    def bits(self) -> str:
        """`WxAy`, or `FP`."""
        return str(self.config.get("bits") or "FP").upper()  # None for a float run of ours

    @property
    def seed(self) -> int | None:
        """Seed of the training."""
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def kind(self) -> str:
        """Equal for runs that differ in nothing but the seed and where things lay."""
        settings = {key: value for key, value in self.config.items() if key not in ("seed", *PLACES)}
        return json.dumps(settings, sort_keys=True)

    @property
    def group(self) -> tuple[str, str, str]:
        """What runs must share to be compared: folder, network, data."""
        return self.name.rpartition("/")[0], self.model, str(self.data.get("fingerprint", self.dataset))

    @property
    def newest_sha256(self) -> str | None:
        """Of the newest checkpoint, by the manifest."""
        names = sorted(self.manifest, key=lambda name: (len(name), name))  # epoch_10000.pt is after epoch_9999.pt
        return self.manifest[names[-1]] if names else None

    @property
    def last_epoch(self) -> int | None:
        """Number of finished epochs."""
        return int(self.rows[-1]["epoch"]) if self.rows else None

    @property
    def finished(self) -> bool:
        """Whether it was trained to the end."""
        return self.last_epoch is not None and self.last_epoch == self.config.get("epochs")

    @property
    def stopped(self) -> bool:
        """Whether it was begun here and not trained to the end."""
        return "epochs" in self.config and not self.finished

    @property
    def last_accuracy(self) -> float | None:
        """Test accuracy after the last epoch, from 0 to 1."""
        return number_of(self.rows[-1], "test_accuracy") if self.rows else None

    @property
    def best_accuracy(self) -> float | None:
        """Of any epoch: chosen on the test images, so too high."""
        found = [value for row in self.rows if (value := number_of(row, "test_accuracy")) is not None]
        return max(found, default=None)

    @property
    def clipped(self) -> float | None:
        """Share of the weights outside their grid after the last epoch; None for a float network."""
        return number_of(self.rows[-1], "clipped_fraction") if self.rows and self.bits != "FP" else None

    @property
    def seconds(self) -> float | None:
        """Time of all epochs' training steps."""
        found = [value for row in self.rows if (value := number_of(row, "seconds")) is not None]
        return sum(found) if found else None


def number_of(row: dict[str, Any], key: str) -> float | None:
    """The finite number under `key`, or None."""
    value = row.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def find_runs(folder: str | Path, *, monitored: bool = False) -> list[Path]:
    """Every run at or below `folder`, sorted: the folders that hold `epoch_NNNN.pt` files.

    Args:
        monitored: also those that hold what a monitor measured, without such files.

    Raises:
        UserError: if the folder does not exist or holds no checkpoint.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(
            f"'{folder}' is a file, and the folder is wanted that it is in: '{folder.parent}'. Of its checkpoints, "
            "--epochs last (or a number) takes one."
        )
    if not folder.is_dir():
        raise UserError(f"No folder '{folder}'. A run, or a folder of runs, is wanted; 'fpq-analyze train' makes one.")
    found = {path.parent for path in folder.rglob("epoch_*.pt") if CHECKPOINT_NAME.fullmatch(path.name)}
    runs = sorted(found | monitored_runs(folder) if monitored else found)
    if not runs:
        raise UserError(no_checkpoints(folder))
    return runs


def no_checkpoints(folder: Path) -> str:
    """A sentence that says so, and whether there are those of another program."""
    others = sorted(p for p in folder.rglob("*") if is_checkpoint(p) and not (p.parent / "run.json").exists())
    if not others:
        return (
            f"'{folder}' holds no checkpoints (files that end in {SUFFIXES[0]}, {SUFFIXES[1]}, {SUFFIXES[-1]}), nor "
            "does any folder below it. 'fpq-analyze train' or 'fpq-analyze demo' makes some."
        )
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    measured = next(folder.rglob("records/*.jsonl"), None) is not None
    kept = " What was measured of them needs neither: figures and compare with --no-measure, and report." * measured
    return (
        f"'{folder}' holds checkpoints of another program ('{others[0].relative_to(folder)}'{more}), which do not say "
        f"of which network they are and on what data it was trained: add {FOREIGN_OPTIONS}.{kept}"
    )


def is_checkpoint(path: Path) -> bool:
    """Whether a file may be a checkpoint, of any program, by its name."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def check_watched(folder: str | Path) -> None:
    """Raise `UserError` unless there is such a folder, in which runs may appear."""
    if not Path(folder).is_dir():
        raise UserError(f"No folder '{folder}' to watch. Make it, or name the one that the training writes to.")


def monitored_runs(folder: str | Path) -> set[Path]:
    """The runs at or below `folder` that a monitor measured while they were trained."""
    return {path.parent.parent for path in Path(folder).rglob(MONITORED)}


def seeds_of(folder: Path) -> dict[int, Path]:
    """Training seed to run, for the run in `folder` and those beside it that differ from it in their seed alone.

    Raises:
        UserError: if the run's own file is damaged or missing; runs beside it of which that is so are left out.
    """
    own = Run(folder.resolve())
    found: dict[int | None, Path] = {own.seed: own.path}
    for beside in sorted(own.path.parent.iterdir()):
        run = Run(beside)
        with going_on(lambda fault: None, str(beside)):
            if (beside / "run.json").exists() and (run.kind, run.data) == (own.kind, own.data):
                found.setdefault(run.seed, beside)
    return {seed: path for seed, path in found.items() if seed is not None}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("fpq-analysis", "torch", "torchvision", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
