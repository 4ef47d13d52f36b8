"""Runs tasks on the workers of a Dask scheduler, or of one made for the purpose on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from typing import Any, ParamSpec, Self, TypeVar
from urllib.parse import parse_qsl

from fpq_analysis.devices import cores
from fpq_analysis.errors import UserError
from fpq_analysis.pipeline.engines.calls import done, packed, unpacked
from fpq_analysis.pipeline.engines.engine import Engine, Resources, not_installed
from fpq_analysis.text import duration

try:
    import dask
    from distributed import Client, LocalCluster
    from distributed.client import FutureCancelledError
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.scheduler import KilledWorker
except ImportError as error:
    raise not_installed("dask", error) from error

T = TypeVar("T")
P = ParamSpec("P")
PATIENCE = 20  # seconds to reach a scheduler
RECOUNT = 5.0  # seconds after which workers are counted anew: they come and go


class DaskEngine(Engine):
    """Tasks as futures of a Dask client.

    Args:
        client: connected to the scheduler; closed with the engine, with the cluster that it was made with, if any.
        resources: what a task takes of a worker, such as `{"GPU": 1}` for workers begun with `--resources GPU=1`.
    """

    def __init__(self, client: Client, resources: dict[str, float] | None = None) -> None:
        self._client = client
        self._resources = resources
        self._flying: dict[Future[Any], Any] = {}  # a future of Dask's that nobody holds is given up
        self._counted = 0.0, 0
        workers = len(client.nthreads())
        self.about = f"Dask: {workers} worker{'s' if workers != 1 else ''}, dashboard at {client.dashboard_link}."

    @classmethod
    def open(cls, address: str, resources: Resources) -> Self:
        """`dask://HOST:PORT`, with `?GPU=1` for what a task takes of a worker, or `dask://local`."""
        place, _, query = address.partition("?")
        try:
            takes = {name: float(amount) for name, amount in parse_qsl(query, strict_parsing=bool(query))}
        except ValueError:
            raise UserError(f"'{query}' are no resources of workers. Write NAME=AMOUNT, such as ?GPU=1.") from None
        if place == "local":
            return cls(_local(resources.jobs or cores()), takes)
        if resources.jobs not in (1, None):
            raise UserError("How many workers there are is the cluster's; leave --jobs out, or use dask://local.")
        if not place:
            raise UserError("--executor dask wants the scheduler's address, dask://HOST:PORT, or dask://local.")
        try:
            # A client of an address without a port fails, and then waits for itself for forty seconds.
            scheme, location = parse_address(place)
            if scheme != "inproc":
                parse_host_port(location)
            return cls(Client(place, timeout=PATIENCE, set_as_default=False), takes)
        except (OSError, ValueError) as error:
            raise UserError(
                f"No Dask scheduler answers at '{place}': {error}. Is it running, and is the port right?"
            ) from error

    def outlook(self, n_tasks: int, seconds: float) -> str:
        """See `Engine.outlook`."""
        busy = max(1, min(self.in_hand, n_tasks))
        return f"{busy} at a time by Dask: {duration(seconds / busy)} or more, at the speed of this machine."

    @property
    def in_hand(self) -> int:  # type: ignore[override]
        """One for each thread that there is now: those that wait at a worker share the blame when it is lost."""
        when, found = self._counted
        if time.monotonic() - when > RECOUNT:
            found = sum(self._client.nthreads().values())
            self._counted = time.monotonic(), found
        return max(1, found)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `Executor.submit`; `UserError` if its workers died, as often as the scheduler allows."""
        ours: Future[T] = Future()
        theirs = self._client.submit(done, packed(fn, args, kwargs), pure=False, resources=self._resources)
        self._flying[ours] = theirs
        theirs.add_done_callback(lambda _: self._settle(ours))
        return ours

    def _settle(self, ours: Future[Any]) -> None:
        theirs = self._flying.pop(ours, None)
        if theirs is None or not ours.set_running_or_notify_cancel():
            return
        try:
            ours.set_result(unpacked(theirs.result()))
        except KilledWorker as error:
            ours.set_exception(_killed(error))
        except FutureCancelledError:
            ours.set_exception(UserError("not done: the Dask scheduler has ended, or gave it up."))
        except Exception as error:
            ours.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Disconnect: when all is done, or with `cancel_futures` at once; workers of `dask://local` end."""
        if cancel_futures:
            with suppress(Exception):
                self._client.cancel(list(self._flying.values()), force=True)
        elif wait:
            wait_for(list(self._flying))
        cluster = self._client.cluster
        self._client.close()
        if cluster is not None:
            cluster.close()


def _killed(error: KilledWorker) -> UserError:
    return UserError(
        f"the Dask worker that did this was lost, and so were {error.allowed_failures} more, last "
        f"{error.last_worker.address}. Its log says why; lack of memory is likely: give workers more, or measure on "
        "fewer samples (--n-data)."
    )


def _local(jobs: int) -> Client:
    """So many workers on this machine, with its cores divided among them."""
    settings = {
        "distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS": max(1, cores() // jobs),
        "distributed.nanny.pre-spawn-environ.MKL_NUM_THREADS": max(1, cores() // jobs),
        "distributed.scheduler.allowed-failures": 1,
    }
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=jobs,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        )
    return Client(cluster, set_as_default=False)
