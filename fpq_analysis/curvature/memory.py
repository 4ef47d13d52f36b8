"""Work in micro-batches that become smaller when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from fpq_analysis.errors import UserError

T = TypeVar("T")


def each(batches: list[tuple[Tensor, ...]], work: Callable[[tuple[Tensor, ...]], T]) -> Iterator[T]:
    """Yield `work(batch)` for every batch.

    Where memory runs out, that batch and those after it are halved, in the list itself, and the work goes on: later
    rounds start with what fitted.  `work` must leave nothing behind when it fails, and add up over parts of a batch.

    Raises:
        UserError: if there is not enough memory for a single sample.
    """
    done = 0
    while done < len(batches):
        try:
            result = work(batches[done])
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            size = len(batches[done][0])
            if size == 1:
                raise UserError(
                    "There is not enough memory for a single sample. Use a machine with more of it, smaller inputs, or "
                    "fewer probes at a time."
                ) from None
        else:
            yield result
            done += 1
            continue
        # Outside of the handler: the error holds the frames of the failed attempt, and with them its tensors.
        batches[done:] = [part for batch in batches[done:] for part in _split(batch, (size + 1) // 2)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _split(batch: tuple[Tensor, ...], most: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(most) for t in batch), strict=True))


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it; the CPU's allocator has only words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
