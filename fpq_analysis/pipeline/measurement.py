"""Checkpoints x a probe -> records, skipping what is done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from torch import nn

from fpq_analysis import __version__
from fpq_analysis import records as rec
from fpq_analysis.data import Dataset, load_run_data, training_sample
from fpq_analysis.devices import peak_memory, pick_device
from fpq_analysis.errors import Fault, UserError, going_on, raise_fault
from fpq_analysis.models import MODELS, find_factory
from fpq_analysis.probes import Point, Probe
from fpq_analysis.progress import Progress
from fpq_analysis.runs import Header, checkpoint, file_hash, find_teacher
from fpq_analysis.runs.checkpoint import Checkpoint
from fpq_analysis.runs.factories import factory_name, source_hash
from fpq_analysis.runs.foreign import ForeignCheckpoint, ForeignRuns

# A forecast measures so many images and twice as many: what does not grow with them, the certificate, is told apart.
FORECAST_IMAGES = 64


class Source(Protocol):
    """Who knows the form on disk: the module `checkpoint`, or a `ForeignRuns`."""

    def find_runs(self, folder: str | Path) -> list[Path]: ...
    def checkpoints(self, run: Path) -> dict[int, Path]: ...
    def header(self, path: Path) -> Header: ...
    def read_checkpoint(self, path: str | Path) -> Checkpoint: ...


def source_of(ckpt_dir: str | os.PathLike[str]) -> Source:
    """How checkpoints in this folder are read."""
    return ckpt_dir if isinstance(ckpt_dir, ForeignRuns) else checkpoint


@dataclass(frozen=True)
class Job:
    """One measurement of one checkpoint; `others` are the files of further networks the probe needs, by need."""

    run: Path
    path: Path
    header: Header
    key: str
    others: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What `measure` would do.

    Attributes:
        root: the folder it was asked for.
        source: how the files in it are read.
        settings: hash of all that does not depend on the checkpoint.
        jobs: to do, in order.
        done: keys of these settings that are measured already.
        faults: files that cannot be measured, with the reason.
        records: see `measure`.
    """

    root: Path
    source: Source
    settings: str
    jobs: list[Job]
    done: set[str]
    faults: list[tuple[Path, UserError]]
    records: Path | None = None

    def home(self, run: Path) -> Path:
        """Where the records of a run are."""
        return rec.home(self.root, run, self.records)


def plan(
    ckpt_dir: str | os.PathLike[str],
    probe: Probe,
    *,
    n_data: int | None = 1024,
    seed: int = 0,
    epochs: str = "all",
    overwrite: bool = False,
    model: str | None = None,
    records: str | os.PathLike[str] | None = None,
) -> Plan:
    """List the measurements of `probe` on the checkpoints at or below `ckpt_dir` that have what the probe needs.

    No weights are read, but of files whose run does not describe them.

    Args:
        epochs: of each run, see `choose_epochs`.
        model, records: see `measure`.

    Raises:
        UserError: if there is no checkpoint, `epochs` makes no sense, `n_data` is too small for an error over the data,
            or there is no such model.
    """
    check_n_data(n_data)
    root = Path(ckpt_dir)
    settings = {**asdict(probe), "version": probe.version, "n_data": n_data, "seed": seed}  # type: ignore[call-overload]
    if model is not None:
        find_factory(model)  # an error of the command, not of each file
    source = source_of(ckpt_dir)
    todo = Plan(root, source, rec.settings_key(probe.name, settings), [], set(), [], Path(records) if records else None)

    def fault_of(path: Path) -> Callable[[UserError], None]:
        return lambda fault: todo.faults.append((path, fault))

    found: dict[Path, dict[int, Path]] = {}
    for run in source.find_runs(root):
        with going_on(fault_of(run), f"'{run}'"):
            found[run] = source.checkpoints(run)
    chosen = {run: choose_epochs(paths, epochs) for run, paths in found.items()}
    if not any(chosen.values()) and not todo.faults:
        last = max((max(paths) for paths in found.values() if paths), default=0)
        raise UserError(f"No run in '{root}' has a checkpoint of epoch {epochs}; their last is {last}.")
    for run, paths in chosen.items():
        finished: set[str] = set()
        with going_on(fault_of(run), f"'{run}'"):
            finished = set() if overwrite else rec.done(todo.home(run), probe.name)
        for path in paths.values():
            with going_on(fault_of(path), f"'{path}'"):
                header = source.header(path)
                others = _others(probe, run, header, found[run])
                if others is None:
                    continue
                hashes = {need: file_hash(other) for need, other in others.items()}
                key = measurement_key(header, probe.name, settings, hashes, model)
                if key in finished:
                    todo.done.add(key)
                else:
                    todo.jobs.append(Job(run, path, header, key, others))
    return todo


def measurement_key(header: Header, probe: str, settings: dict[str, Any], others: Any, model: str | None) -> str:
    """Key of a measurement: it holds whatever decides the numbers.

    Args:
        others: SHA-256 of the files of further networks.
        model: see `measure`.
    """
    name, code = network_code(header, model)
    about = {"epoch": header.epoch, "data": header.data, "network": name, "factory": code, **header.said}
    return rec.measurement_key(header.sha256, probe, {**settings, **about, "others": others})


def network_code(header: Header, model: str | None) -> tuple[str, str | None]:
    """The name of the network that a checkpoint is measured as, and the hash of the code that makes it.

    None for a network of this package, which goes by the probe's version, and for one of the user's that `model` does
    not allow to import: it cannot be measured.

    Raises:
        UserError: if the factory cannot be imported.
    """
    factory = header.model if header.said else model or header.model  # what was said of a foreign file holds
    allowed = header.said or model is not None
    name = factory if isinstance(factory, str) else factory_name(factory)
    if factory in MODELS or not allowed:
        return name, None
    return name, source_hash(find_factory(factory) if isinstance(factory, str) else factory)


def check_n_data(n_data: int | None) -> None:
    """Raise `UserError` if so few images give no error over the data."""
    if n_data is not None and n_data < 2:
        raise UserError(f"n_data is {n_data}; an error over the data needs at least 2 images.")


def choose_epochs(found: dict[int, Path], epochs: str) -> dict[int, Path]:
    """Of a run's checkpoints those asked for.

    Args:
        epochs: `all`; `last`; or numbers with commas between, of which a run may lack some.

    Raises:
        UserError: for anything else.
    """
    if epochs == "all":
        return found
    if epochs == "last":
        return dict(list(found.items())[-1:])
    try:
        wanted = {int(number) for number in epochs.split(",")}
    except ValueError:
        raise UserError(f"'{epochs}' are no epochs. Write all, last, or numbers with commas: 0,10,20.") from None
    return {epoch: path for epoch, path in found.items() if epoch in wanted}


def _others(probe: Probe, run: Path, header: Header, found: dict[int, Path]) -> dict[str, Path] | None:
    """Files of the other networks that the probe needs; None if this checkpoint has not what it needs."""
    others: dict[str, Path | None] = {}
    for need in probe.needs:
        if need == "quantizers":
            if not header.quantized:
                return None
        elif need == "teacher":
            others[need] = find_teacher(run) if header.init else None
        elif need == "previous":
            before = [path for epoch, path in found.items() if epoch < header.epoch]
            others[need] = before[-1] if before else None
    there = {need: path for need, path in others.items() if path is not None}
    return there if len(there) == len(others) else None


def measure(
    ckpt_dir: str | os.PathLike[str],
    probe: Probe,
    *,
    n_data: int | None = 1024,
    seed: int = 0,
    epochs: str = "all",
    overwrite: bool = False,
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
    records: str | os.PathLike[str] | None = None,
    on_fault: Fault | None = None,
) -> pd.DataFrame:
    """Measure every checkpoint of every run at or below `ckpt_dir` that was not measured before.

    All checkpoints see the same `n_data` training images (None: all), drawn by `seed`, without augmentation.

    Args:
        ckpt_dir: a run, or a folder of runs; for another program's checkpoints a `ForeignRuns`.
        epochs: of each run: `all`, `last`, or numbers with commas between.
        data_root: where the data set lies, if not where it was when the run was trained.
        model: for a network of your own, `package.module:factory`.  Its code is part of what was measured: after it
            changed, it is measured anew.
        records: folder in which measurements are kept, each run's under its name, where the runs themselves may not be
            written to; None: in the runs.
        on_fault: called with each checkpoint that cannot be measured and why; the others go on.  None: raise.

    Returns:
        The records of this probe with these settings on the checkpoints that are there now, old and new (columns:
        `records.COLUMNS`).

    Raises:
        UserError: if there is no checkpoint, the data are missing, or a checkpoint cannot be measured.
    """
    sample = {"n_data": n_data, "seed": seed, "epochs": epochs}
    todo = plan(ckpt_dir, probe, overwrite=overwrite, model=model, records=records, **sample)  # type: ignore[arg-type]
    where = {"device": device, "data_root": data_root, "model": model}
    return carry_out(todo, probe, n_data=n_data, seed=seed, on_fault=on_fault, **where)  # type: ignore[arg-type]


def carry_out(
    todo: Plan,
    probe: Probe,
    *,
    n_data: int | None,
    seed: int,
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
    on_fault: Fault | None = None,
) -> pd.DataFrame:
    """Do what `plan` listed; see `measure`.

    Args:
        on_fault: called with each checkpoint that cannot be measured and why; the others go on.  None: raise.
    """
    report = on_fault or raise_fault
    for path, fault in todo.faults:
        report(path, fault)
    sample = Sampler(n_data, seed, data_root, pick_device(device))
    keys = set(todo.done)
    memory: dict[Path, dict[str, Any]] = {}
    with Progress(len(todo.jobs), probe.name) as progress:
        for job in todo.jobs:
            memory = {job.run: memory.get(job.run, {})}  # of one run at a time: it may be large
            with going_on(partial(report, job.path), f"'{job.path}'"):
                measure_one(job, probe, sample, todo, seed=seed, model=model, memory=memory[job.run])
                keys.add(job.key)
            progress.advance()
    return rec.read(todo.records or todo.root, map(todo.home, todo.source.find_runs(todo.root)), probe.name, keys)


def forecast(
    todo: Plan,
    probe: Probe,
    *,
    n_data: int | None = 1024,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
) -> pd.DataFrame:
    """Time one pending checkpoint of every run on few images and extrapolate; nothing is recorded.

    Returns:
        A row a run: run, checkpoints to do, seconds for all of them, and peak memory of this process so far in MB.
    """
    few = FORECAST_IMAGES if n_data is None else min(n_data, FORECAST_IMAGES)
    samples = [Sampler(n, seed, data_root, pick_device(device)) for n in (few, few, 2 * few)]  # the first warms up
    rows = []
    for run in sorted({job.run for job in todo.jobs}):
        jobs = [job for job in todo.jobs if job.run == run]
        content = todo.source.read_checkpoint(jobs[0].path)
        net = build_network(content, model, samples[0])
        others = _networks(jobs[0], todo.source, model, samples[0])
        times = []
        for sample in samples:
            batch = sample(content)
            start = time.perf_counter()
            probe(Point(net, batch, seed=seed, **others))
            times.append(time.perf_counter() - start)
        slope = max(0.0, (times[2] - times[1]) / few)
        n = n_data or content.data["n_train"]
        seconds = (times[1] + slope * (n - few)) * len(jobs)
        rows.append((rec.run_name(todo.root, run), len(jobs), seconds, peak_memory()))
    return pd.DataFrame(rows, columns=["run", "to do", "seconds", "peak MB"])


def measure_one(
    job: Job,
    probe: Probe,
    sample: Sampler,
    todo: Plan,
    *,
    seed: int,
    model: str | None,
    memory: dict[str, Any],
) -> None:
    """Load, measure, record one checkpoint."""
    start = time.perf_counter()
    content = todo.source.read_checkpoint(job.path)
    if content.header != job.header:
        raise UserError(
            f"'{job.path}' is not what it was when this command began: it was changed since, or the run.json beside it "
            "is of another run. Run the command again; if it stays so, put the right run.json there."
        )
    net = build_network(content, model, sample)
    others = _networks(job, todo.source, model, sample)
    rows = probe(Point(net, sample(content), seed=seed, memory=memory, **others))
    common = {
        **describe(content, model, sample.device),
        "probe": probe.name,
        "seed": seed,
        "settings": todo.settings,
        "key": job.key,
        "seconds": round(time.perf_counter() - start, 3),
    }
    rec.append(todo.home(job.run), probe.name, [{**row, **common} for row in rows])


def build_network(content: Checkpoint, model: str | None, sample: Sampler) -> nn.Module:
    """The network of a checkpoint, on the device of the images that it is measured on.

    Args:
        model: see `Checkpoint.build`.

    Raises:
        UserError: see `Checkpoint.build`, or if another program's network does not take these images.
    """
    net = content.build(model).to(sample.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if isinstance(content, ForeignCheckpoint):
        content.check_runs(net, sample(content)[0])
    return net


def _networks(job: Job, source: Source, model: str | None, sample: Sampler) -> dict[str, Any]:
    return {need: build_network(source.read_checkpoint(path), model, sample) for need, path in job.others.items()}


def describe(content: Checkpoint, model: str | None, device: torch.device) -> dict[str, Any]:
    """The columns that say which checkpoint a row is about, and what measured it."""
    quant = content.quant
    name, code = network_code(content.header, model)
    return {
        "method": content.run["method"],
        "model": name,
        "factory": code,
        "dataset": content.data["name"],
        "bits": f"W{quant['weight_bits']}A{quant['act_bits']}" if quant else "FP",
        "train_seed": content.run["seed"],
        "data": content.data["fingerprint"],
        "epoch": content.epoch,
        "checkpoint": content.sha256,
        "package": __version__,
        "torch": str(torch.__version__),
        "device": str(device),
        "dtype": content.dtype,
    }


class Sampler:
    """The images to measure on; a data set that several runs share is read once.

    Args:
        n_data: how many; None for all training images.
        seed: of the draw.
        data_root: where the data set lies, if not where it was when the run was trained.
        device: where the images are to be.
    """

    def __init__(self, n_data: int | None, seed: int, data_root: str | None, device: torch.device) -> None:
        self.n_data = n_data
        self.seed = seed
        self.data_root = data_root
        self.device = device
        self._cache: dict[tuple[Any, ...], tuple[Dataset, tuple[torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, content: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels for this checkpoint.

        Raises:
            UserError: if the data are missing, or are not those it was trained on.
        """
        config = content.run
        root = self.data_root or config["data_root"]
        key = (config["data"], root, config["image_size"], str(config.get("feed")))
        if key not in self._cache:
            data = load_run_data(config, root)
            images, labels = training_sample(data, self.n_data or len(data.train), self.seed)
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
