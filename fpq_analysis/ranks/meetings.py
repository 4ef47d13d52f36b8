"""How ranks talk: they meet before they exchange anything, and say what they are about to do and what went wrong.

What goes wrong on one rank is raised on all of them at the next meeting.  Ranks that are not about to do the same stop
with an error there, instead of waiting for each other.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fpq_analysis.errors import UserError, explained

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # others may be busy for as long as they like; one that has ended is noticed at once
APART = (
    "The ranks are no longer doing the same thing, so their results would not fit together. Inside over_ranks() every "
    "rank has to make the same calls with the same settings."
)


class RankLostError(UserError):
    """Another rank has ended, so that nothing more can be measured by all of them."""

    def __init__(self) -> None:
        super().__init__(
            "Another rank has ended, or cannot be reached, and a measurement over several ranks needs all of them. "
            "What was finished is kept; start all ranks again to go on."
        )


class Meetings:
    """All ranks, for one block of work.

    Attributes:
        rank, size: this process's place, and among how many.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        backends = dist.get_backend_config()
        self._on_device = "cuda:nccl" in backends
        # What is said goes by the CPU.  A group of our own does not outlive the block: torch ends it with the others.
        self._own: Any = None if "cpu:gloo" in backends else dist.new_group(backend="gloo", timeout=PATIENCE)
        self._held = 0
        self._fault: Exception | None = None

    def meet(self, about: str, error: Exception | None = None, what: object = None) -> None:
        """Wait for the others.

        Args:
            what: more of what it is about, which those that have an `error` need not know.

        Raises:
            Exception: the first rank's `error` that has one; a `UserError` if the others are about something else.
        """
        if self._fault is not None:
            raise self._fault
        self._held += 1
        words = f"{self._held} {about}", repr(what)
        mine = torch.tensor([*(zlib.crc32(word.encode()) for word in words), error is not None])
        table = [torch.empty_like(mine) for _ in range(self.size)]
        with reaching():
            dist.all_gather(table, mine, group=self._own)
        failed = [rank for rank, row in enumerate(table) if row[2]]
        if len({int(row[0]) for row in table}) > 1 or len({int(row[1]) for row in table if not row[2]}) > 1:
            self._fault = as_shared(UserError(APART))  # some may have left the block
        if failed:
            raised = self.of_all(None if error is None else portable(error))[failed[0]]
            assert raised is not None
            raise as_shared(error if error is not None and failed[0] == self.rank else raised)
        if self._fault is not None:
            raise self._fault

    def of_all(self, value: T) -> list[T]:
        """Each rank's value."""
        found: list[Any] = [None] * self.size
        with reaching():
            dist.all_gather_object(found, value, group=self._own)
        return found

    def add(self, total: Tensor) -> None:
        """Replace a tensor by its sum over the ranks, which is taken in float64."""
        on_device = total.is_cuda and self._on_device
        wide = total.detach().to("cpu" if not on_device else total.device, torch.float64, copy=True).contiguous()
        with reaching():
            dist.all_reduce(wide, group=None if on_device else self._own)
        total.copy_(wide)

    @contextmanager
    def after(self, about: str, what: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Inside is work of this rank alone, after which all meet; see `meet`."""
        try:
            yield
        except Exception as error:
            self.meet(about, error)
            raise
        self.meet(about, what=what())

    def leave(self) -> None:
        """Give back what was made for the block."""
        if self._own is not None:
            dist.destroy_process_group(self._own)


@contextmanager
def reaching() -> Iterator[None]:
    """Inside, messages are sent and received, and nothing else is done."""
    try:
        yield
    except Exception as error:  # of a connection, or what came of half a message
        raise as_shared(RankLostError()) from error


def portable(error: Exception) -> Exception:
    """The error, or one with its words, that other processes can be handed."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return explained(error)
    return error


def as_shared(error: Exception) -> Exception:
    """The error, marked as one that all ranks have."""
    error._on_all_ranks = True  # type: ignore[attr-defined]
    return error


def is_shared(error: BaseException | None) -> bool:
    """Whether all ranks have this error, or the one that it was made from."""
    while error is not None:
        if getattr(error, "_on_all_ranks", False):
            return True
        error = error.__cause__ or error.__context__
    return False
