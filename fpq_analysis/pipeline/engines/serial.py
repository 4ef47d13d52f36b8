"""Runs tasks one after another in the current process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, Self, TypeVar

from fpq_analysis.errors import UserError
from fpq_analysis.pipeline.engines.engine import Engine, Resources

T = TypeVar("T")
P = ParamSpec("P")


class SerialExecutor(Engine):
    """Does each task in this process before `submit` returns."""

    @classmethod
    def open(cls, address: str, resources: Resources) -> Self:
        """See `Engine.open`."""
        if address or resources.jobs not in (1, None):
            raise UserError("The executor 'serial' is this process alone; leave --jobs and an address out.")
        return cls()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The outcome of the call, which is there already; Ctrl-C ends it as it would without an executor."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
