"""Checkpoints measured as they appear: while a training goes on, by this program or another, here or elsewhere.

A file is measured once it is whole: its run's manifest names it as it is, or its size and time did not change from one
look to the next, or for as long.  Order does not matter: files may come late, backwards, or again with other content.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from fpq_analysis.errors import Fault, UserError, raise_fault
from fpq_analysis.pipeline.engines.engine import open_engine
from fpq_analysis.pipeline.plan import Plan, check_probe, plan
from fpq_analysis.pipeline.run import run
from fpq_analysis.pipeline.task import Sampling
from fpq_analysis.probes.point import Probe
from fpq_analysis.runs import Source, source_of
from fpq_analysis.runs.run import check_watched
from fpq_analysis.runs.stamps import read_stamps

INTERVAL = 10.0  # seconds
TRIES = 3  # of a file that does not change and cannot be measured

State = tuple[int, int]  # size, and time of the last change


@dataclass
class _Failure:
    """What was wrong with a file as it was (None: with a whole run), and how often it was tried."""

    state: State | None
    fault: UserError
    tries: int = 1


def watch(
    ckpt_dir: str | os.PathLike[str],
    probes: Probe | Sequence[Probe],
    *,
    interval: float = INTERVAL,
    timeout: float | None = None,
    n_data: int | None = 1024,
    seed: int = 0,
    epochs: str = "all",
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
    loss: str = "cross_entropy",
    records: str | os.PathLike[str] | None = None,
    executor: str | None = None,
    jobs: int | str = 1,
    on_round: Callable[[pd.DataFrame], None] | None = None,
    on_fault: Fault | None = None,
) -> pd.DataFrame:
    """Measure the checkpoints at or below `ckpt_dir` as they appear, until nothing changes any more.

    Args:
        probes: one or more.
        interval: seconds between two looks at the folder.
        timeout: end after so many seconds in which no file changed; 0: after one look.  None: never, but by an
            interrupt, at which all that was measured is on disk.
        on_round: called with all records so far, after every look that led to new ones.
        on_fault: called at the end with each file that could not be measured and why: it was tried three times, and
            once more after every change.  None: raise.

    The other arguments, and the records returned: see `measure`.

    Raises:
        UserError: if at the end there is no checkpoint, or one cannot be measured; for a folder that does not exist.
    """
    check_watched(Path(ckpt_dir))
    if interval <= 0 or (timeout is not None and timeout < 0):
        raise UserError("The interval must be above zero, and the timeout not below (0: one look), in seconds.")
    every = list(probes) if isinstance(probes, Sequence) and not isinstance(probes, str) else [probes]
    for probe in every:
        check_probe(probe)
    if not every:
        raise UserError("No probe is given, so there is nothing to measure.")
    sampling = Sampling(n_data, seed, device, data_root, model, loss)
    options: dict[str, Any] = {"epochs": epochs, "records": records}
    failures: dict[Path, _Failure] = {}
    seen: dict[Path, State] = {}
    changed = time.monotonic()
    with open_engine(executor, jobs, device=device, folder=Path(records or ckpt_dir)) as engine:
        while True:
            state = _files(source_of(ckpt_dir), Path(ckpt_dir))
            whole = {path for path in state if _is_whole(path, state[path], seen.get(path), interval)}
            # The others are gone, or other files by now.
            failures = {path: failure for path, failure in failures.items() if state.get(path) == failure.state}
            ready = {path for path in whole if path not in failures or failures[path].tries < TRIES}
            looked = time.monotonic()
            if state != seen:
                changed = looked
            seen = state
            if ready:
                frames, n_new = [], 0
                faults: dict[Path, UserError] = {}
                for probe in every:
                    todo = _limited(plan(ckpt_dir, probe, sampling, **options), ready, state.keys())
                    frames.append(run(todo, executor=engine, on_fault=faults.__setitem__))
                    n_new += len(todo.measurements)
                frame = pd.concat(frames, ignore_index=True)
                failures = _after(failures, faults, ready, state)
                if n_new and len(frame) and on_round is not None:
                    on_round(frame)
            trying = any(failure.tries < TRIES for failure in failures.values())
            # Of this look: what came while it was measured is for the next one to find.
            if timeout is not None and looked - changed >= timeout and not (trying and timeout):
                break
            time.sleep(interval)

    report = on_fault or raise_fault
    for path in sorted(state.keys() - whole):
        report(path, UserError(f"'{path}' was still being written to. Run the command again when its writer is done."))
    for path, failure in failures.items():
        report(path, failure.fault)
    if not whole - failures.keys():
        raise UserError(f"No checkpoint in '{Path(ckpt_dir)}' could be measured while it was watched.")
    return frame


def _limited(todo: Plan, ready: set[Path], there: Collection[Path]) -> Plan:
    """The plan of the files that are ready alone, with what is wrong with these and with whole runs."""
    measurements = [measurement for measurement in todo.measurements if measurement.path in ready]
    faults = [(path, fault) for path, fault in todo.faults if path in ready or path not in there]
    return replace(todo, measurements=measurements, faults=faults)


def _after(
    before: dict[Path, _Failure], faults: dict[Path, UserError], tried: set[Path], state: dict[Path, State]
) -> dict[Path, _Failure]:
    """The failures after a round: those that it has met, and of the files that it did not try those of before."""
    found = {path: failure for path, failure in before.items() if path in state and path not in tried}
    for path, fault in faults.items():
        tries = before[path].tries + 1 if path in before else 1
        found[path] = _Failure(state.get(path), fault, tries)
    return found


def _files(source: Source, folder: Path) -> dict[Path, State]:
    """The checkpoints that are there now."""
    found: dict[Path, State] = {}
    with suppress(UserError):  # there is none yet
        for folder_of_run in source.find_runs(folder):
            with suppress(UserError):
                for path in source.checkpoints(folder_of_run).values():
                    with suppress(OSError):  # it was taken away meanwhile
                        stat = path.stat()
                        found[path] = stat.st_size, stat.st_mtime_ns
    return found


def _is_whole(path: Path, state: State, before: State | None, interval: float) -> bool:
    """Whether nothing is being written to a file, as far as can be seen from outside."""
    if not state[0]:
        return False
    with suppress(UserError, OSError):
        stamp = read_stamps(path.parent / "manifest.json").get(path.name)
        if stamp is not None and stamp.fits(path):
            return True
    return state == before or time.time() - state[1] / 1e9 >= interval
