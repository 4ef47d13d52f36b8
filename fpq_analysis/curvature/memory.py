"""Work in micro-batches that become smaller when memory runs out, and what of it is kept while there is enough."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from fpq_analysis.devices import free_memory
from fpq_analysis.errors import NoMemoryError, out_of_memory
from fpq_analysis.nests import size, split
from fpq_analysis.progress import tick
from fpq_analysis.ranks import n_ranks, neighbours

T = TypeVar("T")
SHARE = 0.5  # of the free memory, for graphs that are kept: bases and the work itself need the rest


def map_batches(
    batches: list[tuple[Tensor, ...]], work: Callable[[tuple[Tensor, ...]], T], rounds: int = 1
) -> Iterator[T]:
    """Yield `work(batch)` for every batch, which goes over its samples `rounds` times.

    Where memory runs out, that batch and those after it are halved, in the list itself, and the work goes on: later
    rounds start with what fitted.  `work` must leave nothing behind when it fails, and add up over parts of a batch.

    Raises:
        NoMemoryError: if there is not enough for a single sample.
    """
    done, before = 0, list(batches)
    while done < len(batches):
        try:
            result = work(batches[done])
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            most = (size(batches[done]) + 1) // 2
            if size(batches[done]) == 1:
                batches[:] = before  # where others make room, it is tried again
                raise NoMemoryError(
                    "There is not enough memory for a single sample. Use a machine with more of it, smaller inputs, or "
                    "fewer probes at a time."
                ) from None
        else:
            tick(rounds * size(batches[done]) * n_ranks())  # others go over theirs meanwhile
            yield result
            done += 1
            continue
        # Outside of the handler: the error holds the frames of the failed attempt, and with them its tensors.
        batches[done:] = [part for batch in batches[done:] for part in split(batch, most)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class GraphStore:
    """Graphs of micro-batches, kept for the next product while all of them fit into their share of memory.

    Args:
        variables: on the device of the work; graphs save them too, and are not charged for it.
        limit: bytes they may take; None for `SHARE` of what is free when the first one is built.

    Attributes:
        taken: bytes they take.
    """

    def __init__(self, variables: list[Tensor], limit: int | None = None) -> None:
        self.variables = variables
        self.limit = limit
        self.taken = 0
        self._kept: dict[int, tuple[Tensor, Any]] = {}  # by the identity of a micro-batch's inputs, which are held too

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, batch: tuple[Tensor, ...], build: Callable[[tuple[Tensor, ...]], Any]) -> Any:
        """The graph that was kept of this micro-batch, or a new one."""
        if id(batch[0]) in self._kept:
            return self._kept[id(batch[0])][1]
        if self.limit is None:
            self.limit = int(SHARE * free_memory(self.variables[0].device)) // neighbours(self.variables[0].device)
        if self.taken >= self.limit:
            return build(batch)
        saved: dict[int, int] = {}

        def weigh(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda t: t):
            graph = build(batch)
        for variable in self.variables:
            saved.pop(variable.untyped_storage().data_ptr(), None)
        size = sum(saved.values())
        if self.taken + size <= self.limit:
            self.taken += size
            self._kept[id(batch[0])] = batch[0], graph
        return graph

    def clear(self) -> None:
        """Let go of all graphs, and keep fewer from now on."""
        self._kept.clear()
        self.limit = self.taken // 2
        self.taken = 0


# Parameters of glibc's `mallopt`, and the largest values to which glibc itself moves them.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
USUAL = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}
_keepers = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, what is freed on the CPU stays with the process, to be taken again, and goes back at the end.

    glibc returns the top of its heap to the system as soon as it is free.  Every product frees several times the size
    of the parameters, and pages that come back are cleared anew: of eleven million parameters, for as long as a third
    of the product.  Elsewhere than on glibc this does nothing.
    """
    global _keepers
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is not None and _keepers == 0:
        libc.mallopt(MMAP_THRESHOLD, 2**30)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    _keepers += 1
    try:
        yield
    finally:
        _keepers -= 1
        if libc is not None and _keepers == 0:
            for what, value in USUAL.items():
                libc.mallopt(what, value)
            libc.malloc_trim(0)
