"""What files of a run were when they were last hashed, so that one that has not changed need not be read again.

`manifest.json` has the stamps of the checkpoints, entered when they were written, and vouches for them;
`records/files.json` those of files of other programs, entered when they were read.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fpq_analysis.errors import UserError
from fpq_analysis.files import SETTLED, read_json, sha256, write_json
from fpq_analysis.schema import check


@dataclass(frozen=True)
class Stamp:
    """What a file was when it was last hashed; `size` and `mtime_ns` are None in manifests older than 0.1.

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
    stamp = read_stamps(path.parent / "manifest.json").get(path.name)
    if stamp is not None and stamp.sha256 != digest:
        raise UserError(
            f"'{path}' is damaged: its SHA-256 is not the one recorded when it was written. Copy it again "
            "from its source, or train the run anew with --overwrite."
        )
    return stamp is not None


def check_same(path: Path, stamp: Stamp) -> None:
    """Raise `UserError` if a file changed since `stamp` was taken, so that hash and content may not belong together."""
    if not stamp.fits(path):
        raise UserError(f"'{path}' was written to while it was read. Run the command again when its writer is done.")


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
