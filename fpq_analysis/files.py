"""Atomic writes, which a kill or a full disk cannot turn into damage, and reading what a kill left behind."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fpq_analysis.errors import UserError, refused

# A file younger than this is hashed again the next time: where times are kept in steps of two seconds, it may change
# once more without one (git calls such a file racy).
SETTLED = 2.0


@contextlib.contextmanager
def writing(path: Path, what: str = "written") -> Iterator[None]:
    """Context in which an `OSError` (a full disk, a read-only folder, ...) becomes a `UserError` about `path`."""
    try:
        yield
    except OSError as error:
        raise refused(path, error, what) from error


reading = functools.partial(writing, what="read")


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step; makes the folder if need be.

    A reader, or a machine that loses power, sees the whole old file or the whole new one.  If `write` fails (a full
    disk, say), the old file stands and the temporary one is removed.

    Raises:
        UserError: if it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not named after `path`: with more letters than its own it might be too long a name.
        handle, name = tempfile.mkstemp(prefix=".fpq-", suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes the file private; give it the rights an ordinary new file would have.
            umask = os.umask(0)
            os.umask(umask)
            part.chmod(0o666 & ~umask)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # Without this, the rename itself may be lost in a crash.  Not every file system allows it.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    atomic_write(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append `rows`, one JSON object a line, in a single write that is on disk when this returns.

    Raises:
        UserError: if they cannot be written.
    """
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            # A writer killed in mid-line leaves no newline: start on a fresh line, so that only the torn one is lost.
            end = file.seek(0, os.SEEK_END)
            if end > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    text = "\n" + text
            try:
                left = memoryview(text.encode())
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # the disk is full: not half a measurement
                raise


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: if it holds anything else, or cannot be read.
    """
    try:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is damaged: it is not a JSON object. Restore it from a copy.")
    return content


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; torn or damaged lines are left out, a missing file has no rows.

    Raises:
        UserError: if it cannot be read.
    """
    return [row for row in read_lines(path) if row is not None]


def read_lines(path: Path) -> list[dict[str, Any] | None]:
    """As `read_jsonl`, with None in the place of a damaged line."""
    if not path.exists():
        return []
    with reading(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    rows: list[dict[str, Any] | None] = []
    for line in filter(None, text.split("\n")):
        rows.append(None)
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            rows[-1] = row if isinstance(row, dict) else None
    return rows


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bad_member(path: Path) -> str | None:
    """The first member of a zip archive that does not match its checksum (CRC-32); None if all match.

    None too for archives without checksums (all zero, after `torch.serialization.set_crc32_options(False)`) and for
    other files, see `has_checksums`.
    """
    if not has_checksums(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def has_checksums(path: Path) -> bool:
    """Whether the file can show by itself that a bit was flipped."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.CRC for member in archive.infolist())
