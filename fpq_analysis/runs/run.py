"""A run's folder, as far as it is known without reading weights (and without torch).

<run>/run.json             config, versions, what the data set is
<run>/epoch_0000.pt ...    before training and after every epoch, see `checkpoint.py`
<run>/manifest.json        SHA-256, size and time of each checkpoint, entered when it was written
<run>/train.jsonl          a row an epoch
<run>/resume.pt            optimiser state, for going on after a kill; replaced every epoch
<run>/records/             what was measured, see `records/table.py`
<run>/records/files.json   the same as the manifest, of files that it does not vouch for, entered when they were read
"""

from __future__ import annotations

import contextlib
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fpq_analysis.errors import UserError
from fpq_analysis.files import read_json, read_jsonl, sha256, write_json
from fpq_analysis.schema import RunFile, TrainRow, check

CHECKPOINT_NAME = re.compile(r"epoch_(\d{4,})\.pt")
FOREIGN_OPTIONS = "--model package.module:factory --data NAME"  # for files of another program, see `runs/foreign.py`
# A file younger than this is hashed again the next time: where times are kept in steps of two seconds, it may change
# once more without one (git calls such a file racy).
SETTLED = 2.0


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
        said: what the user said of it that does not stand in the file; of a file of ours, nothing.
    """

    epoch: int
    sha256: str
    model: str | Callable[..., Any]
    data: str
    quantized: bool
    init: str | None
    said: dict[str, Any] = field(default_factory=dict)


def read_header(path: Path) -> Header | None:
    """The header of a checkpoint of ours, from `run.json` and the file's name; None if these do not say enough.

    Raises:
        UserError: if the file is missing, is not the one that the manifest names, or `run.json` is damaged.
    """
    match = CHECKPOINT_NAME.fullmatch(path.name)
    if match is None or not (path.parent / "run.json").exists():
        return None
    about = read_run(path.parent)
    config, data = about["config"], about["data"]
    quantized = config["bits"] is not None
    return Header(int(match[1]), file_hash(path), config["model"], data["fingerprint"], quantized, config["init"])


@dataclass(frozen=True)
class Stamp:
    """What a file was when it was last hashed; `size` and `mtime_ns` are None in manifests of before 0.1.

    Attributes:
        channels: of the images that a network of another program takes, see `runs/foreign.py`; None if not known.
    """

    sha256: str
    size: int | None = None
    mtime_ns: int | None = None
    channels: int | None = None

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Of the file as it is now; all of it is read."""
        stat = path.stat()  # before its bytes, so that a change while they are read is seen the next time
        return cls(sha256(path), stat.st_size, stat.st_mtime_ns)

    def fits(self, path: Path) -> bool:
        """Whether the file has the size and the time it had then."""
        stat = path.stat()
        return (self.size, self.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def known_stamp(path: Path) -> Stamp | None:
    """The stamp of a file that has not changed since it was written, or else since it was last hashed."""
    stamps = (read_stamps(file).get(path.name) for file in (path.parent / "manifest.json", _seen(path.parent)))
    return next((stamp for stamp in stamps if stamp is not None and stamp.fits(path)), None)


def remember(path: Path, stamp: Stamp) -> None:
    """Note the stamp of a file that the manifest does not vouch for; where nothing can be written, nothing is noted."""
    if stamp.mtime_ns is None or time.time() - stamp.mtime_ns / 1e9 < SETTLED:
        return
    file = _seen(path.parent)
    kept = {name: one for name, one in read_stamps(file).items() if (path.parent / name).exists()}
    with contextlib.suppress(OSError, UserError):
        file.parent.mkdir(exist_ok=True)
        write_stamps(file, {**kept, path.name: stamp})


def file_hash(path: Path) -> str:
    """SHA-256 of a checkpoint, read only if its size or time are not those written down.

    Raises:
        UserError: if it is missing, or is not the one that the manifest names.
    """
    if not path.is_file():
        raise UserError(f"No checkpoint '{path}'.")
    stamp = known_stamp(path)
    if stamp is None:
        stamp = Stamp.of(path)
        remember(path, stamp)
    check_manifest(path, stamp.sha256)
    return stamp.sha256


def check_manifest(path: Path, digest: str) -> bool:
    """Whether the manifest vouches for a file with this SHA-256; False if it does not name the file.

    Raises:
        UserError: if it names another hash.
    """
    recorded = read_manifest(path.parent).get(path.name)
    if recorded not in (None, digest):
        raise UserError(
            f"'{path}' is damaged: its SHA-256 is not the one recorded when it was written. Copy it again "
            "from its source, or train the run anew with --overwrite."
        )
    return recorded is not None


def check_same(path: Path, stamp: Stamp) -> None:
    """Raise `UserError` if a file changed since `stamp` was taken, so that hash and content may not belong together."""
    if not stamp.fits(path):
        raise UserError(f"'{path}' was written to while it was read. Run the command again when its writer is done.")


def read_manifest(run: Path) -> dict[str, str]:
    """File name to SHA-256; empty if the run has no manifest."""
    return {name: stamp.sha256 for name, stamp in read_stamps(run / "manifest.json").items()}


def read_stamps(file: Path) -> dict[str, Stamp]:
    """File name to stamp; empty if the file is not there.

    Raises:
        UserError: if it is damaged.
    """
    if not file.exists():
        return {}
    stamps = {}
    for name, about in read_json(file).items():
        fields: dict[str, Any] = {"sha256": about} if isinstance(about, str) else about
        check(Stamp, fields, f"The entry '{name}' of '{file}'")
        stamps[name] = Stamp(**{key: fields[key] for key in Stamp.__dataclass_fields__ if key in fields})
    return stamps


def write_stamps(file: Path, stamps: dict[str, Stamp]) -> None:
    """Write them as JSON, atomically."""
    known = {name: asdict(stamp) for name, stamp in stamps.items()}
    write_json(file, {name: {k: v for k, v in about.items() if v is not None} for name, about in known.items()})


def _seen(run: Path) -> Path:
    return run / "records" / "files.json"


def find_runs(folder: str | Path) -> list[Path]:
    """Every run at or below `folder`, sorted: the folders that hold `epoch_NNNN.pt` files.

    Raises:
        UserError: if the folder does not exist or holds no checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"No folder '{folder}'. A run, or a folder of runs, is wanted; 'fpq-analyze train' makes one.")
    runs = sorted({path.parent for path in folder.rglob("epoch_*.pt") if CHECKPOINT_NAME.fullmatch(path.name)})
    if not runs:
        raise UserError(
            f"'{folder}' holds no checkpoints (files named epoch_0000.pt, ...), nor does any folder below it. "
            f"'fpq-analyze train' or 'fpq-analyze demo' makes some. For those of another program: {FOREIGN_OPTIONS}."
        )
    return runs


def checkpoints(run: Path) -> dict[int, Path]:
    """Epoch to file for one run, in order of epochs."""
    found = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in run.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def find_teacher(run: Path) -> Path | None:
    """The float checkpoint that `run` started from; None for a run that started from none.

    It is looked for where it was, and beside `run`, should both have been moved.

    Raises:
        UserError: if it is not there, or no longer the same.
    """
    about = read_run(run)
    init, wanted = about["config"].get("init"), about.get("teacher")
    if init is None or wanted is None:
        return None
    for folder in (Path(init), run.parent / Path(init).name):
        manifest = read_manifest(folder)
        for path in checkpoints(folder).values() if folder.is_dir() else ():
            if manifest.get(path.name, wanted) == wanted and file_hash(path) == wanted:
                return path
    raise UserError(
        f"The float network that '{run}' started from is not in '{init}', nor in '{run.parent / Path(init).name}' "
        f"(SHA-256 {wanted[:12]}...). Move its run there, or run the command in the folder where it was trained."
    )


def read_run(run: Path) -> dict[str, Any]:
    """The content of `run.json`.

    Raises:
        UserError: if the file is missing, is not JSON, or a field of `schema.RunFile` is not what it must be.
    """
    path = run / "run.json"
    if not path.exists():
        raise UserError(f"'{run}' is not a run: it has no run.json. 'fpq-analyze train' makes one.")
    content = read_json(path)
    check(RunFile, content, f"'{path}'")
    return content


def read_training(run: Path) -> list[dict[str, Any]]:
    """The rows of `train.jsonl`, one an epoch, in order: of repeated ones the newest.

    Raises:
        UserError: if a field of `schema.TrainRow` is not what it must be.
    """
    path = run / "train.jsonl"
    rows: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(path):
        check(TrainRow, row, f"'{path}'")
        rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("fpq-analysis", "torch", "torchvision", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
