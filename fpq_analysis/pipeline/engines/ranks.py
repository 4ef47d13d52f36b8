"""Does each task on all ranks of torch.distributed together, each of which measures its share of the samples."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import ParamSpec, Self, TypeVar

from fpq_analysis.errors import UserError
from fpq_analysis.pipeline.engines.engine import Resources
from fpq_analysis.pipeline.engines.serial import SerialExecutor
from fpq_analysis.ranks import RankLostError
from fpq_analysis.ranks.leading import together

T = TypeVar("T")
P = ParamSpec("P")


class RanksExecutor(SerialExecutor):
    """Does each task before `submit` returns; for the first rank, see `ranks.lead`."""

    @classmethod
    def open(cls, address: str, resources: Resources) -> Self:
        """See `Engine.open`."""
        if address or resources.jobs != 1:
            raise UserError("All ranks measure each checkpoint together; leave --jobs out, or torchrun.")
        return cls()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The outcome of the call on this rank, whose rows are those of all samples."""
        future = super().submit(partial(together, partial(fn, *args, **kwargs)))
        if isinstance(error := future.exception(), RankLostError):
            raise error  # it is no fault of the task, and the end of all
        return future
