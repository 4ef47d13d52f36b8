"""Runs tasks in several processes of this machine, which stay, and share its cores and GPUs."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util  # whose exit handler, which waits for children, must be behind ours
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import LifoQueue
from typing import Any, ParamSpec, Self, TypeVar

from fpq_analysis.errors import UserError
from fpq_analysis.pipeline.engines.calls import done, packed, unpacked
from fpq_analysis.pipeline.engines.engine import Engine, Resources
from fpq_analysis.text import duration

T = TypeVar("T")
P = ParamSpec("P")
# A fresh interpreter: a fork of one that has used threads or CUDA can hang.
SPAWN = multiprocessing.get_context("spawn")
# How often a task may take its process with it; the first time may be another's fault, such as memory they shared.
ATTEMPTS = 2
STOPPED = "not done: the processes were stopped."
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ProcessEngine(Engine):
    """`jobs` processes, each started when there is work for it, and again when it has died.

    Args:
        jobs: how many; None: one a GPU, or else one a core.
        device: where the tasks compute; with `auto` or `cuda` each process sees one GPU, in turn.
    """

    def __init__(self, jobs: int | None = None, device: str = "auto") -> None:
        # Brings torch, and the processes import this file before they have said how many threads it may have.
        from fpq_analysis.devices import cores, count_gpus

        gpus = count_gpus() if device in ("auto", "cuda") else 0
        self.jobs = jobs or gpus or (cores() if device in ("auto", "cpu") else 1)
        self.threads = max(1, cores() // self.jobs)  # of each process
        self._idle: LifoQueue[_Worker] = LifoQueue()  # a warm one first
        for i in reversed(range(self.jobs)):
            self._idle.put(_Worker(self.threads, i % gpus if gpus > 1 else None))
        self._workers = list(self._idle.queue)
        self._threads = ThreadPoolExecutor(self.jobs)  # one waits for each process
        atexit.register(self._stop)

    @classmethod
    def open(cls, address: str, resources: Resources) -> Self:
        """See `Engine.open`."""
        if address:
            raise UserError(f"The executor 'processes' has no address, such as '{address}'; --jobs says how many.")
        return cls(resources.jobs, resources.device)

    def outlook(self, n_tasks: int, seconds: float) -> str:
        """See `Engine.outlook`."""
        busy = min(self.jobs, max(1, n_tasks))
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{busy} processes of {threads} each: {duration(seconds / busy)} or more."

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `Executor.submit`; `UserError` if the process that did it was lost, and the next one too."""
        return self._threads.submit(self._call, fn, args, kwargs)

    def _call(self, *call: Any) -> Any:
        worker = self._idle.get()
        try:
            return unpacked(worker.call(packed(*call)))
        finally:
            self._idle.put(worker)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: when all is done, or with `cancel_futures` at once."""
        if cancel_futures:
            self._stop()
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        if wait:
            self._stop()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        atexit.unregister(self._stop)


class _Worker:
    """A process that does one call after another."""

    def __init__(self, threads: int, gpu: int | None) -> None:
        self.process: Any = None
        self._settings = threads, gpu
        self._stopped = False
        self._starting = threading.Lock()  # or one could be started behind the back of `stop`

    def call(self, call: bytes) -> bytes:
        """What it returned, or raised."""
        for _ in range(ATTEMPTS):
            self._start()
            try:
                self._pipe.send_bytes(call)
                return self._pipe.recv_bytes()
            except (EOFError, ConnectionError):
                if self._stopped:
                    raise UserError(STOPPED) from None
                self.process.join()
                how = self.process.exitcode
        raise UserError(
            f"the process that did this ended without a word, and so did a second one ({_ending(how)}). Take fewer at "
            "a time (--jobs), or fewer samples (--n-data)."
        )

    def _start(self) -> None:
        with self._starting:
            if self._stopped:
                raise UserError(STOPPED)
            if self.process is not None and self.process.is_alive():
                return
            self._pipe, there = SPAWN.Pipe()
            self.process = SPAWN.Process(target=_serve, args=(there, *self._settings))
            self.process.start()
            there.close()
        try:
            self._pipe.recv_bytes()
        except EOFError:
            self.process.join()
            raise UserError(
                f"no process could be started ({_ending(self.process.exitcode)}). In a script, what it does must stand "
                "below `if __name__ == '__main__':`, as other processes import it, too."
            ) from None

    def stop(self) -> None:
        """End it now."""
        with self._starting:
            self._stopped = True
            if self.process is not None:
                self.process.kill()
                self.process.join()


def _ending(code: int | None) -> str:
    if code is None or code == -signal.SIGKILL:
        return "killed, as the system does when memory runs out"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(pipe: Connection, threads: int, gpu: int | None) -> None:
    """What a process does: calls, until there is nobody to ask for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # stdout is for the parent's numbers, whatever the user's code prints
    for name in THREADS:  # before numpy and torch are loaded
        given = os.environ.get(name, "")
        os.environ[name] = str(min(threads, int(given)) if given.isdecimal() else threads)
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    import torch

    torch.set_num_threads(min(threads, torch.get_num_threads()))
    pipe.send_bytes(b"ready")
    while True:
        try:
            call = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        pipe.send_bytes(done(call))


def _end_with_parent() -> None:
    """A task may take hours, and nobody would have its result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
