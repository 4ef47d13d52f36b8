"""Samples are divided over ranks, and sums and rows put together again.

Inside `over_ranks()` every rank makes the same calls, with the same network, data and seeds.  What goes over the data
asks for its `share`, and is put together by `added` or `gathered`; everything else is computed on every rank alike,
from the same numbers.  What is random is drawn for all samples before they are divided, so that the number of ranks
changes nothing but the order in which float64 numbers are added.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fpq_analysis.errors import UserError
from fpq_analysis.nests import moved, size, take
from fpq_analysis.ranks.meetings import Meetings, is_shared

T = TypeVar("T")
END = "the end"

_meetings: Meetings | None = None


@contextmanager
def over_ranks() -> Iterator[None]:
    """Inside, measurements divide their samples over all ranks of torch.distributed.

    Every rank makes the same calls, with the same network and *all* of the data (not a `DistributedSampler`'s share),
    and every rank gets the result.  Networks in DistributedDataParallel or `fully_shard` are taken as they are.

    Raises:
        UserError: if torch.distributed is not initialised; on every rank what went wrong on any of them.
    """
    global _meetings
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            "over_ranks() divides the work over the ranks of torch.distributed, which is not initialised. Start the "
            "script by torchrun, and call torch.distributed.init_process_group() first."
        )
    if _meetings is not None:
        raise UserError("over_ranks() stands inside another over_ranks(); once is enough.")
    _meetings = meetings = Meetings()
    try:
        yield
    except Exception as error:
        if not is_shared(error):
            meetings.meet(END, error)
        raise
    else:
        meetings.meet(END)
    finally:
        _meetings = None
        meetings.leave()


@contextmanager
def undivided() -> Iterator[None]:
    """Inside, this rank works alone, as outside `over_ranks()`."""
    global _meetings
    outside, _meetings = _meetings, None
    try:
        yield
    finally:
        _meetings = outside


def meetings() -> Meetings | None:
    """Of the block of `over_ranks()` that this is inside; None where nothing is divided."""
    return _meetings


def dividing() -> bool:
    """Whether samples are divided over several ranks."""
    return _meetings is not None and _meetings.size > 1


def share(batches: Sequence[T]) -> list[T]:
    """This rank's part of the samples, which are divided evenly and in their order; all where nothing is divided.

    Args:
        batches: nests (`nests.py`), which are cut where a share ends.
    """
    if _meetings is None:
        return list(batches)
    sizes = list(map(size, batches))
    start, stop = (sum(sizes) * place // _meetings.size for place in (_meetings.rank, _meetings.rank + 1))
    parts, before = [], 0
    for batch, length in zip(batches, sizes, strict=True):
        inside = slice(max(start - before, 0), min(stop - before, length))
        if inside.start < inside.stop:
            parts.append(batch if inside == slice(0, length) else take(batch, inside))
        before += length
    return parts


def added(work: Iterable[object], sums: Iterable[Tensor]) -> None:
    """Go through the work, which adds to `sums`; then add these up over the ranks, in float64 and in place."""
    if _meetings is None:
        for _ in work:
            pass
        return
    found: list[Tensor] = []
    with _meetings.after("sums", lambda: [tuple(total.shape) for total in found]):
        for _ in work:
            pass
        found += sums
    for total in found:
        _meetings.add(total)


def gathered(work: Iterable[T]) -> Iterable[T]:
    """What the work yields, in the order of the samples; on the CPU where it comes from several ranks."""
    if _meetings is None or not dividing():
        return work
    with _meetings.after("rows"):
        own = [moved(part, torch.device("cpu")) for part in work]
    return chain.from_iterable(_meetings.of_all(own))


def on_first(call: Callable[[], T]) -> T:
    """Make the call on the first rank alone; its result, on all ranks.  Files are written in such calls."""
    if _meetings is None:
        return call()
    with _meetings.after("what the first rank does"):
        value: Any = call() if _meetings.rank == 0 else None
    return _meetings.of_all(value)[0]


def mean_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each rank's own values by their mean over the ranks."""
    if _meetings is not None:
        found = list(tensors)
        added((), found)
        for total in found:
            total.div_(_meetings.size)


def n_ranks() -> int:
    """Ranks that samples are divided over."""
    return _meetings.size if _meetings is not None else 1


def place() -> int:
    """This rank's number, where samples are divided; otherwise 0."""
    return _meetings.rank if _meetings is not None else 0


def neighbours(device: torch.device) -> int:
    """Ranks that share the memory of this device, this one among them; on one machine all of them, if nothing says."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", _meetings.size)) if _meetings is not None else 1
    return -(-here // torch.cuda.device_count()) if device.type == "cuda" else here
