"""Checkpoints x a probe -> records, skipping what is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fpq_analysis import records
from fpq_analysis.checkpoint import Checkpoint, checkpoints, find_runs, read_checkpoint
from fpq_analysis.data import Dataset, load_dataset, training_sample
from fpq_analysis.devices import pick_device
from fpq_analysis.errors import UserError
from fpq_analysis.probes import Point, Probe
from fpq_analysis.progress import Progress

# Images a forecast measures before it extrapolates; as many as fill one micro-batch.
FORECAST_IMAGES = 64


@dataclass(frozen=True)
class Job:
    """One measurement that is still to do."""

    run: Path
    path: Path
    key: str


@dataclass(frozen=True)
class Plan:
    """What `measure` would do.

    Attributes:
        jobs: to do, in order.
        n_done: measured already.
        faults: files that cannot be measured, with the reason.
    """

    jobs: list[Job]
    n_done: int
    faults: list[tuple[Path, UserError]]


Fault = Callable[[Path, UserError], None]


def plan(ckpt_dir: str | Path, probe: Probe, *, n_data: int = 1024, seed: int = 0, overwrite: bool = False) -> Plan:
    """List the measurements of `probe` on every checkpoint at or below `ckpt_dir`.

    Raises:
        UserError: if there is no checkpoint.
    """
    settings = {**asdict(probe), "n_data": n_data, "seed": seed}  # type: ignore[call-overload]
    jobs, n_done, faults = [], 0, []
    for run in find_runs(ckpt_dir):
        finished = set() if overwrite else records.done(run, probe.name)
        for path in checkpoints(run).values():
            try:
                key = records.measurement_key(read_checkpoint(path).sha256, probe.name, settings)
            except UserError as fault:
                faults.append((path, fault))
                continue
            if key in finished:
                n_done += 1
            else:
                jobs.append(Job(run, path, key))
    return Plan(jobs, n_done, faults)


def measure(
    ckpt_dir: str | Path,
    probe: Probe,
    *,
    n_data: int = 1024,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
    on_fault: Fault | None = None,
    show_progress: bool = True,
) -> pd.DataFrame:
    """Measure every checkpoint of every run at or below `ckpt_dir` that was not measured before.

    All checkpoints see the same `n_data` training images, drawn by `seed`, without augmentation.

    Args:
        data_root: where the data set lies, if not where it was when the run was trained.
        model: for a network of your own, `package.module:factory`.
        on_fault: called with each checkpoint that cannot be measured and why; the others go on.  None: raise.

    Returns:
        The records of this probe on these runs, old and new (columns: `records.COLUMNS`).

    Raises:
        UserError: if there is no checkpoint, the data are missing, or (without `on_fault`) a checkpoint is at fault.
    """
    todo = plan(ckpt_dir, probe, n_data=n_data, seed=seed, overwrite=overwrite)
    report = on_fault or _raise
    for path, fault in todo.faults:
        report(path, fault)
    where = pick_device(device)
    sample = _Sampler(n_data, seed, data_root, where)
    with Progress(len(todo.jobs), probe.name, show=show_progress) as progress:
        for job in todo.jobs:
            try:
                measure_one(job, probe, sample, seed=seed, model=model)
            except UserError as fault:
                report(job.path, fault)
            progress.advance()
    return records.read(find_runs(ckpt_dir), probe.name)


def forecast(
    todo: Plan,
    probe: Probe,
    *,
    n_data: int = 1024,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
) -> pd.DataFrame:
    """Time one pending checkpoint of every run on few images and extrapolate; nothing is recorded.

    Returns:
        A row a run: run, checkpoints to do, seconds for all of them, and peak memory of this process so far in MB.
    """
    few = min(n_data, FORECAST_IMAGES)
    sample = _Sampler(few, seed, data_root, pick_device(device))
    rows = []
    for run in sorted({job.run for job in todo.jobs}):
        jobs = [job for job in todo.jobs if job.run == run]
        content = read_checkpoint(jobs[0].path)
        net = content.build(model).to(sample.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = sample(content)
        start = time.perf_counter()
        probe(Point(net, batch, seed=seed))
        seconds = (time.perf_counter() - start) * n_data / few * len(jobs)
        rows.append({"run": run.name, "to do": len(jobs), "seconds": seconds, "peak MB": _peak_memory()})
    return pd.DataFrame(rows, columns=["run", "to do", "seconds", "peak MB"])


def _peak_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() // 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def measure_one(job: Job, probe: Probe, sample: _Sampler, *, seed: int, model: str | None) -> None:
    """Load, measure, record one checkpoint."""
    start = time.perf_counter()
    content = read_checkpoint(job.path)
    net = content.build(model).to(sample.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = probe(Point(net, sample(content), seed=seed))
    common = {
        **describe(job.run, content),
        "checkpoint": content.sha256,
        "probe": probe.name,
        "seed": seed,
        "key": job.key,
        "seconds": round(time.perf_counter() - start, 3),
    }
    records.append(job.run, probe.name, [{**row, **common} for row in rows])


def describe(run: Path, content: Checkpoint) -> dict[str, Any]:
    """The columns that say which checkpoint a row is about."""
    quant = content.quant
    return {
        "run": run.name,
        "method": content.run["method"],
        "model": content.model["name"],
        "dataset": content.data["name"],
        "bits": f"W{quant['weight_bits']}A{quant['act_bits']}" if quant else "FP",
        "train_seed": content.run["seed"],
        "epoch": content.epoch,
    }


def _raise(path: Path, fault: UserError) -> None:
    raise fault


class _Sampler:
    """The images to measure on; a data set that several runs share is read once."""

    def __init__(self, n_data: int, seed: int, data_root: str | None, device: torch.device) -> None:
        self.n_data = n_data
        self.seed = seed
        self.data_root = data_root
        self.device = device
        self._cache: dict[tuple[Any, ...], tuple[Dataset, tuple[torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, content: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        config = content.run
        # The split seed matters only where the data set has no test split of its own.
        root = self.data_root or config["data_root"]
        key = (config["data"], root, config["image_size"], config["seed"])
        if key not in self._cache:
            data = load_dataset(config["data"], root, image_size=config["image_size"], seed=config["seed"])
            images, labels = training_sample(data, self.n_data, self.seed)
            self._cache[key] = data, (images.to(self.device), labels.to(self.device))
        data, batch = self._cache[key]
        if data.fingerprint != content.data["fingerprint"]:
            raise UserError(
                f"The data in '{root or data.name}' are not those the checkpoint was trained on ({len(data.train)} "
                f"training images in {data.num_classes} classes here, {content.data['n_train']} in "
                f"{len(content.data['classes'])} then, or other pixels). Point --data-root at the data set of the "
                "training run."
            )
        return batch
