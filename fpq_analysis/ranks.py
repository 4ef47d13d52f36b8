"""One measurement by several processes, or ranks: samples are divided, and sums and rows are put together again.

Inside `over_ranks()` every rank makes the same calls, with the same network, data and seeds.  What goes over the data
asks for its `share`, and is put together by `added` or `gathered`; everything else is computed on every rank alike,
from the same numbers.  What is random is drawn for all samples before they are divided, so that the number of ranks
changes nothing but the order in which float64 numbers are added.

Ranks meet before they exchange anything, and say what they are about to do.  What goes wrong on one is raised on all of
them there; and ranks that are not about to do the same stop with an error, instead of waiting for each other.
"""

from __future__ import annotations

import os
import pickle
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fpq_analysis.errors import UserError, explained

T = TypeVar("T")
END = "the end"
PATIENCE = timedelta(days=30)  # others may be busy for as long as they like; one that has ended is noticed at once
APART = (
    "The ranks are no longer doing the same thing, so their results would not fit together. Inside over_ranks() every "
    "rank has to make the same calls with the same settings."
)
LOST = (
    "Another rank has ended, or cannot be reached, and a measurement over several ranks needs all of them. What was "
    "finished is kept; start all ranks again to go on."
)


@contextmanager
def over_ranks() -> Iterator[None]:
    """Inside, measurements divide their samples over all ranks of torch.distributed.

    Every rank makes the same calls, with the same network and *all* of the data (not a `DistributedSampler`'s share),
    and every rank gets the result.  Networks in DistributedDataParallel or `fully_shard` are taken as they are.

    Raises:
        UserError: if torch.distributed is not initialised; on every rank what went wrong on any of them.
    """
    global _ranks
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            "over_ranks() divides the work over the ranks of torch.distributed, which is not initialised. Start the "
            "script by torchrun, and call torch.distributed.init_process_group() first."
        )
    if _ranks is not None:
        raise UserError("over_ranks() stands inside another over_ranks(); once is enough.")
    _ranks = ranks = _Ranks()
    try:
        yield
    except Exception as error:
        if not _was_shared(error):
            ranks.meet(END, error)
        raise
    else:
        ranks.meet(END)
    finally:
        _ranks = None
        ranks.leave()


def dividing() -> bool:
    """Whether samples are divided over several ranks."""
    return _ranks is not None and _ranks.size > 1


def share(batches: Sequence[T]) -> list[T]:
    """This rank's part of the samples, which are divided evenly and in their order; all where nothing is divided.

    Args:
        batches: nests of tensors, whose first axis are the samples; they are cut where a share ends.
    """
    if _ranks is None:
        return list(batches)
    sizes = [len(tree_leaves(batch)[0]) for batch in batches]
    start, stop = (sum(sizes) * place // _ranks.size for place in (_ranks.rank, _ranks.rank + 1))
    parts, before = [], 0
    for batch, size in zip(batches, sizes, strict=True):
        inside = slice(max(start - before, 0), min(stop - before, size))
        if inside.start < inside.stop:
            parts.append(batch if inside == slice(0, size) else tree_map(lambda t, of=inside: t[of], batch))
        before += size
    return parts


def added(work: Iterable[object], sums: Iterable[Tensor]) -> None:
    """Go through the work, which adds to `sums`; then add these up over the ranks, in float64 and in place."""
    with _agreement("sums"):
        for _ in work:
            pass
    if _ranks is not None:
        for total in sums:
            _ranks.add(total)


def gathered(work: Iterable[T]) -> Iterable[T]:
    """What the work yields, in the order of the samples; on the CPU where it comes from several ranks."""
    if not dividing():
        return work
    assert _ranks is not None
    with _agreement("rows"):
        own = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, list(work))
    return chain.from_iterable(_ranks.of_all(own))


def check_same(what: str, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
    """Raise `UserError` unless every rank has the same numbers.

    Args:
        what: these are, as the beginning of a sentence.
        tensors: gives them, by name; not called where nothing is divided.
    """
    if not dividing():
        return
    assert _ranks is not None
    with _agreement("fingerprints"):
        own = {name: _fingerprint(t) for name, t in tensors()}
    first, *others = _ranks.of_all(own)
    for rank, other in enumerate(others, 1):
        different = [name for name in first | other if first.get(name) != other.get(name)]
        if different:
            raise UserError(
                f"{what} not the same on all ranks: '{different[0]}' of rank {rank} is not that of rank 0. "
                "Inside over_ranks() every rank is given the same network and all of the data in the same order, and "
                "measures its own share of the samples: no DistributedSampler, and no shuffling by a seed of its own."
            )


def neighbours(device: torch.device) -> int:
    """Ranks that share the memory of this device, this one among them; on one machine all of them, if nothing says."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", _ranks.size)) if _ranks is not None else 1
    return -(-here // torch.cuda.device_count()) if device.type == "cuda" else here


def lead(work: Callable[[], T]) -> T:
    """Let the first rank do the work, and the others what it hands out by `together`; its result, on every rank.

    Raises:
        UserError: on every rank what the first one raised; if it, or another, cannot be reached.
    """
    global _ranks, _leading
    if dist.get_rank() > 0:
        return _follow()
    outside, _ranks = _ranks, None
    _leading = True
    outcome: tuple[Any, Exception | None] = (None, None)
    try:
        outcome = work(), None
        return outcome[0]
    except Exception as error:
        outcome = None, _portable(error)
        raise
    finally:
        _leading, _ranks = False, outside
        with suppress(UserError):  # all that is left to do is to end
            _tell((None, outcome))


def leading() -> bool:
    """Whether this is the first of several ranks, and the others wait for calls to make."""
    return _leading and dist.get_world_size() > 1


def together(call: Callable[[], T]) -> T:
    """Make the call on all ranks, inside `over_ranks()`; where this one does not lead others, here.

    Args:
        call: that other processes can be handed.
    """
    if not leading():
        return call()
    _tell((call, None))
    with over_ranks():
        return call()


def _follow() -> Any:
    global _ranks
    outside, _ranks = _ranks, None
    try:
        while True:
            call, outcome = _tell(None)
            if call is None:
                break
            with suppress(Exception), over_ranks():  # it is raised on the first rank, which goes on or ends
                call()
    finally:
        _ranks = outside
    value, error = outcome
    if error is not None:
        raise _shared(error)
    return value


def _tell(message: Any) -> Any:
    """The first rank's message, on every rank."""
    box = [message]
    with _reaching():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def launched(work: Callable[[], T]) -> T:
    """`lead`, in processes that torchrun has started; it ends them when one has ended."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    alone = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # NCCL wants a device for each
    dist.init_process_group("cpu:gloo,cuda:nccl" if alone else "gloo", timeout=PATIENCE)
    try:
        return lead(work)
    finally:
        dist.destroy_process_group()


def from_first(value: T) -> T:
    """The first rank's value, on all ranks."""
    return value if _ranks is None else _ranks.of_all(value)[0]


def _fingerprint(t: Tensor) -> tuple[int, str, int]:
    plain = t.detach().cpu().contiguous()
    data: Any = plain.reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data), str(plain.dtype), plain.numel()


@contextmanager
def _agreement(about: str) -> Iterator[None]:
    """Inside is work of this rank's own, after which all meet."""
    try:
        yield
    except Exception as error:
        if _ranks is not None:
            _ranks.meet(about, error)
        raise
    if _ranks is not None:
        _ranks.meet(about)


class _Ranks:
    """All ranks, for one block of work.

    Attributes:
        rank, size: this process's place, and among how many.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        backends = dist.get_backend_config()
        self._on_device = "cuda:nccl" in backends
        # What is said goes by the CPU.
        self._own: Any = None if "cpu:gloo" in backends else dist.new_group(backend="gloo", timeout=PATIENCE)
        self._meetings = 0
        self._fault: Exception | None = None

    def meet(self, about: str, error: Exception | None = None) -> None:
        """Wait for the others.

        Raises:
            Exception: the first rank's `error` that has one; a `UserError` if the others are about something else.
        """
        if self._fault is not None:
            raise self._fault
        self._meetings += 1
        mine = torch.tensor([zlib.crc32(f"{self._meetings} {about}".encode()), error is not None])
        table = [torch.empty_like(mine) for _ in range(self.size)]
        with _reaching():
            dist.all_gather(table, mine, group=self._own)
        if any(bool(row[0] != mine[0]) for row in table):
            self._fault = _shared(UserError(APART))  # some may have left the block
        failed = [rank for rank, row in enumerate(table) if row[1]]
        if failed:
            raised = self.of_all(None if error is None else _portable(error))[failed[0]]
            assert raised is not None
            raise _shared(error if error is not None and failed[0] == self.rank else raised)
        if self._fault is not None:
            raise self._fault

    def leave(self) -> None:
        """Give back what was made for the block."""
        if self._own is not None:
            dist.destroy_process_group(self._own)

    def of_all(self, value: T) -> list[T]:
        """Each rank's value."""
        found: list[Any] = [None] * self.size
        with _reaching():
            dist.all_gather_object(found, value, group=self._own)
        return found

    def add(self, total: Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        on_device = total.is_cuda and self._on_device
        wide = total.detach().to(total.device if on_device else "cpu", torch.float64, copy=True).contiguous()
        with _reaching():
            dist.all_reduce(wide, group=None if on_device else self._own)
        total.copy_(wide)


_ranks: _Ranks | None = None
_leading = False


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
        raise _shared(UserError(LOST)) from error


def _portable(error: Exception) -> Exception:
    """The error, or one with its words, that other processes can be handed."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return explained(error)
    return error


def _shared(error: Exception) -> Exception:
    error._on_all_ranks = True  # type: ignore[attr-defined]
    return error


def _was_shared(error: BaseException | None) -> bool:
    """Whether all ranks have this error, or one that it was made from."""
    while error is not None:
        if getattr(error, "_on_all_ranks", False):
            return True
        error = error.__cause__ or error.__context__
    return False
