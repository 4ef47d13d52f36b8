"""Runs tasks as jobs of Slurm, several a job; these go on without the command, and the next one collects.

What a job has done lies in a folder, a file a task.  So a job that was put back into the queue goes on where it was,
and nothing depends on Slurm's accounting: a job that is in the queue no more, and has left out a task, was lost.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import torch

from fpq_analysis import __version__
from fpq_analysis.errors import UserError, explained
from fpq_analysis.files import atomic_write, read_json, write_json
from fpq_analysis.pipeline.engines.calls import done, packed, unpacked
from fpq_analysis.pipeline.engines.engine import Engine, Resources, not_installed
from fpq_analysis.text import duration

try:
    import submitit
    from submitit.helpers import DelayedSubmission
except ImportError as error:
    raise not_installed("slurm", error) from error

T = TypeVar("T")
P = ParamSpec("P")
FOLDER = ".slurm"
PAUSE = 1.0  # seconds between looks at the folder; what was asked for and no more comes for so long is submitted
QUEUE = 10.0  # seconds between questions to Slurm
GRACE = 30.0  # seconds that a file may take to be seen from another machine
ATTEMPTS = 2
DEFAULTS: dict[str, Any] = {"timeout_min": 60}
SBATCH = {"timeout_min": "time", "mem_gb": "mem"}  # what users of submitit write, in the words of sbatch


class SlurmEngine(Engine):
    """Jobs of Slurm, submitted by submitit as arrays.

    Args:
        folder: for tasks, results and logs; every node sees it.
        per_job: tasks that a job does one after the other.
        parameters: of submitit's `SlurmExecutor`: partition, gpus_per_node, timeout_min, array_parallelism, ...
    """

    in_hand = sys.maxsize

    def __init__(self, folder: Path, per_job: int = 8, **parameters: Any) -> None:
        self.folder = folder
        self._per_job = per_job
        self._parameters = {**DEFAULTS, **parameters}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._submitter = submitit.SlurmExecutor(folder / "jobs")
            sbatch = {SBATCH.get(name, name): value for name, value in self._parameters.items()}
            sbatch |= {"mem": f"{parameters['mem_gb']}GB"} if "mem_gb" in parameters else {}
            fixed = {"job_name": "fpq-analyze", "additional_parameters": {"requeue": True}}
            self._submitter.update_parameters(**fixed, **sbatch)
        except RuntimeError as error:
            raise UserError(f"Slurm is not found here ({error}). Call this where sbatch answers.") from error
        except ValueError as error:
            raise UserError(f"Slurm's parameters in --executor: {' '.join(str(error).split())}") from error
        self._lock = threading.Lock()
        self._waiting: dict[str, _Asked] = {}
        self._flying: dict[str, _Asked] = {}
        self._jobs: dict[str, float] = {}  # ours, and when each was last seen in the queue
        self._settled: set[str] = set()
        self._asked_at = self._queue_at = 0.0
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @classmethod
    def open(cls, address: str, resources: Resources) -> Self:
        """`slurm:partition=gpu,gpus_per_node=1,timeout_min=60,per_job=8,...`."""
        if resources.jobs not in (1, None):
            raise UserError("How many jobs run at a time is array_parallelism=N behind --executor slurm: ; no --jobs.")
        pairs = [one.partition("=") for one in address.split(",") if one]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise UserError(f"'{wrong[0]}' in --executor slurm is no KEY=VALUE, such as partition=gpu,timeout_min=60.")
        given = {name: int(value) if value.isdecimal() else value for name, _, value in pairs}
        per_job = given.pop("per_job", resources.batch)
        if not isinstance(per_job, int) or per_job < 1:
            raise UserError(f"per_job={per_job} in --executor slurm is no number of checkpoints.")
        return cls(resources.folder.absolute() / FOLDER, per_job, **given)

    def outlook(self, n_tasks: int, seconds: float) -> str:
        """See `Engine.outlook`."""
        jobs = -(-n_tasks // self._per_job)
        each = seconds / max(1, n_tasks) * min(n_tasks, self._per_job)
        given = ", ".join(f"{name}={value}" for name, value in self._parameters.items())
        text = (
            f"Would submit an array of {jobs} Slurm jobs of up to {self._per_job} checkpoints or points each "
            f"({given}). At the speed of this machine a job takes {duration(each)}."
        )
        limit = self._parameters["timeout_min"]
        return (
            text if each < 60.0 * limit else f"{text} That is longer than timeout_min allows: take a smaller per_job."
        )

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `Executor.submit`; `UserError` if its jobs were lost."""
        asked = _Asked(packed(fn, args, kwargs))
        what = getattr(args[0], "identity", None) if args else None
        about = __version__, fn.__module__, fn.__qualname__, what or (args, kwargs)
        with self._lock:
            self._waiting[hashlib.sha256(repr(about).encode()).hexdigest()[:32]] = asked
            self._asked_at = time.monotonic()
        return asked.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop looking: when all is done, or with `cancel_futures` at once; the jobs then go on."""
        if not cancel_futures and wait:
            wait_for([asked.future for asked in [*self._waiting.values(), *self._flying.values()]])
        self._ended.set()
        self._watcher.join()
        going = []
        for job, names in self._tickets().items():
            if self._settled.issuperset(names):
                self._ticket(job).unlink(missing_ok=True)
            elif job in self._jobs:
                going.append(job)
        for name in self._settled:  # what was handed back is recorded by now
            self._outcome(name).unlink(missing_ok=True)
        if going:
            text = f"Slurm jobs go on: {', '.join(going)}. The same command collects; scancel JOB ends one."
            print(text, file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._ended.wait(PAUSE):
            try:
                with self._lock:
                    self._look()
            except Exception as error:  # of the disk, or of sbatch: nobody else would hear of it
                with self._lock:
                    self._give_up(explained(error, "--executor slurm"))

    def _look(self) -> None:
        now = time.monotonic()
        if self._waiting and now - self._asked_at > PAUSE:
            self._collect(self._waiting)
            queued = self._queue() or ()
            for job, names in self._tickets().items():
                ours = [name for name in names if name in self._waiting]
                if ours and job in queued:
                    self._jobs.setdefault(job, now)
                    self._flying |= {name: self._waiting.pop(name) for name in ours}
            if self._waiting:
                self._submit_waiting()
        self._collect(self._flying)
        if self._flying and now - self._queue_at > QUEUE:
            self._queue_at = now
            alive = self._queue()
            for job in list(self._jobs):
                if alive is None or job in alive:
                    self._jobs[job] = now
                elif now - self._jobs[job] > GRACE:
                    self._lost(job)

    def _submit_waiting(self) -> None:
        names = list(self._waiting)
        shares = [names[i : i + self._per_job] for i in range(0, len(names), self._per_job)]
        batches = [Batch(self.folder, {name: self._waiting[name].call for name in share}) for share in shares]
        with self._submitter.batch():
            jobs = [self._submitter.submit(batch) for batch in batches]
        for job, share in zip(jobs, shares, strict=True):
            write_json(self._ticket(job.job_id), {"tasks": share})
            self._jobs[job.job_id] = time.monotonic()
        self._flying |= self._waiting
        self._waiting = {}

    def _collect(self, some: dict[str, _Asked]) -> None:
        there = {path.stem for path in self.folder.glob("*.outcome")}
        for name in [name for name in some if name in there]:
            asked = some.pop(name)
            self._settled.add(name)
            asked.settle(self._outcome(name).read_bytes())

    def _lost(self, job: str) -> None:
        """What it has not done is submitted once more: what it was at has used up an attempt, the rest has not."""
        names = read_json(self._ticket(job))["tasks"]
        self._ticket(job).unlink()
        del self._jobs[job]
        left = [name for name in names if name in self._flying]
        for place, name in enumerate(left):
            asked = self._flying.pop(name)
            asked.attempts += place == 0
            if asked.attempts < ATTEMPTS:
                self._waiting[name] = asked
            else:
                asked.fail(
                    UserError(
                        f"Slurm job {job} ended while it was at this, as one did before it (cancelled, out of time or "
                        f"memory?). Its log is in '{self.folder / 'jobs'}'."
                    )
                )

    def _queue(self) -> set[str] | None:
        """Jobs that wait or run; None if Slurm does not say just now."""
        asked = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=False)
        return None if asked.returncode else set(asked.stdout.split())

    def _give_up(self, fault: UserError) -> None:
        for asked in [*self._waiting.values(), *self._flying.values()]:
            asked.fail(fault)
        self._waiting, self._flying = {}, {}

    def _tickets(self) -> dict[str, list[str]]:
        """By job, what it was asked to do."""
        return {path.stem: read_json(path)["tasks"] for path in self.folder.glob("*.job")}

    def _ticket(self, job: str) -> Path:
        return self.folder / f"{job}.job"

    def _outcome(self, name: str) -> Path:
        return self.folder / f"{name}.outcome"


class _Asked:
    """A call that somebody waits for."""

    def __init__(self, call: bytes) -> None:
        self.call = call
        self.future: Future[Any] = Future()
        self.attempts = 0

    def settle(self, outcome: bytes) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(unpacked(outcome))
            except Exception as error:
                self.future.set_exception(error)

    def fail(self, fault: UserError) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(fault)


class Batch:
    """What a job does: calls, each of which leaves its outcome in the folder."""

    def __init__(self, folder: Path, calls: dict[str, bytes]) -> None:
        self.folder = folder
        self.calls = calls

    def __call__(self) -> None:
        torch.set_num_threads(int(os.environ.get("SLURM_CPUS_ON_NODE", "1")))
        for name, call in self.calls.items():
            place = self.folder / f"{name}.outcome"
            if not place.exists():  # it is, of a job that was put back into the queue
                outcome = done(call)
                atomic_write(place, lambda file, outcome=outcome: file.write(outcome))  # type: ignore[misc]

    def checkpoint(self) -> DelayedSubmission:
        """What goes on where this was preempted, see submitit."""
        return DelayedSubmission(self)
