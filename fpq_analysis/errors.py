"""The exceptions that the command line shows as a paragraph instead of a traceback, and how any other becomes one."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can fix.  The message says what is wrong, the likely cause, and what to do next."""


# What is done with a file or folder that cannot be used.
Fault = Callable[[Path, UserError], None]


def raise_fault(path: Path, fault: UserError) -> None:
    """The default `Fault`: stop at the first one."""
    raise named(fault, f"'{path}'") from fault


class UnfitError(UserError):
    """Something that makes a curvature meaningless: a sentence, and its cure."""

    def __init__(self, finding: str, cure: str) -> None:
        super().__init__(f"{finding} {cure}")
        self.finding = finding
        self.cure = cure

    def __reduce__(self) -> tuple[type[UnfitError], tuple[str, str]]:
        return type(self), (self.finding, self.cure)  # another process may raise it


class NothingToDraw(UserError):  # noqa: N818 -- as StopIteration: often no fault
    """Records hold nothing that this figure shows."""


FULL = "Make room, and run the same command again."
ELSEWHERE = "Choose another place, or change its rights."
NO_FOLDER = "A file stands where a folder is wanted, or the other way round: move it away, or choose another name."
CURES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "The limit on the size of a file (ulimit -f) is too low.",
    errno.EROFS: ELSEWHERE,
    errno.EACCES: ELSEWHERE,
    errno.EPERM: ELSEWHERE,
    errno.ENOTDIR: NO_FOLDER,
    errno.EEXIST: NO_FOLDER,
    errno.EISDIR: NO_FOLDER,
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "Is the path right, and is a disk missing?",
    errno.EMFILE: "Too many files are open at once: raise the limit (ulimit -n).",
}


def refused(path: object, error: OSError, what: str = "written") -> UserError:
    """What the machine said no to, as an error that names the file.

    Args:
        what: the file cannot be `written` or `read`.
    """
    cure = CURES.get(error.errno or 0, "Is the disk in order?")
    return UserError(f"'{path}' cannot be {what}: {error.strerror or error}. {cure}")


class NoMemoryError(UserError):
    """There is not enough memory, and nothing is left that could give way."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was wanting: NumPy and CUDA have classes for it, the CPU's allocator has words."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def explained(error: Exception, about: str = "") -> UserError:
    """Any exception as one to be shown; what nobody foresaw is a fault of the program, and says so.

    Args:
        about: what was being done, or with which file, as the beginning of a sentence.
    """
    if isinstance(error, UserError):
        return error
    where = f"{about}: " if about else ""
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        text = f"{where}{error.strerror}{f' ({error.filename!r})' if error.filename else ''}. "
        found = UserError(text + CURES.get(error.errno, "Is the disk in order?"))
    elif out_of_memory(error):
        found = UserError(f"{where}out of memory. Measure on fewer samples (--n-data), or end what else is running.")
    elif "pickle" in str(error):
        found = UserError(
            f"{where}{error}. What other processes measure with must be importable there: put the function into a "
            "module, and name it: package.module:factory."
        )
    else:
        found = UserError(
            f"{where}{kind}: {error} -- this is a fault of the program. Run again with FPQ_DEBUG=1 for the traceback, "
            "and please report it."
        )
    found.__cause__ = error
    return found


def named(error: UserError, about: str) -> UserError:
    """The same, beginning with what it is about unless it says so already."""
    return error if about.strip("'") in str(error) else type(error)(f"{about}: {error}")


@contextmanager
def naming(about: str) -> Iterator[None]:
    """Inside, every `UserError` says what it is about: `'a/file'`, say."""
    try:
        yield
    except UserError as error:
        raise named(error, about) from error


@contextmanager
def going_on(report: Callable[[UserError], object], about: str) -> Iterator[None]:
    """Hand whatever goes wrong inside to `report`, so that one bad thing stops nothing else; FPQ_DEBUG=1 stops there.

    Args:
        about: see `explained`.
    """
    try:
        yield
    except UserError as error:
        report(error)
    except Exception as error:
        if os.environ.get("FPQ_DEBUG"):
            raise
        report(explained(error, about))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
