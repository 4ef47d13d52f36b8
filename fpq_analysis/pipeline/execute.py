"""From a task to its rows, in whatever process: nothing is needed but the task, and no rows are written."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fpq_analysis import __version__
from fpq_analysis.batch import Batch
from fpq_analysis.data import own
from fpq_analysis.devices import pick_device
from fpq_analysis.errors import UserError, explained
from fpq_analysis.nests import moved, take
from fpq_analysis.pipeline.plan import key_now, network_code
from fpq_analysis.pipeline.task import Sampling, Task, TaskResult
from fpq_analysis.probes.point import Pieces, Piecewise, Point, Probe, Rows
from fpq_analysis.quantizers import adopt, quantization, rounded_weight
from fpq_analysis.runs import file_hash
from fpq_analysis.runs.checkpoint import Checkpoint
from fpq_analysis.runs.foreign import ForeignCheckpoint


def execute(task: Task) -> TaskResult:
    """Measure one piece.  What it takes to begin is kept for the next piece of the same measurement.

    Raises:
        UserError: if it cannot be measured, whatever the reason; with FPQ_DEBUG=1 what was raised is raised on.
    """
    with _one_at_a_time, redirect_stdout(sys.stderr):  # stdout is for numbers, whatever the user's code prints
        try:
            return _execute(task)
        except UserError:
            raise
        except Exception as error:
            if os.environ.get("FPQ_DEBUG"):
                raise
            # As text: not every exception can be handed to another process.
            raise explained(error, f"'{task.measurement.path}'") from error


def forget() -> None:
    """Let go of what is kept between tasks."""
    _kept.active = None
    _kept.batches.clear()
    _kept.beside.clear()
    own.forget()


def _execute(task: Task) -> TaskResult:
    start = time.perf_counter()
    same = replace(task, piece="")
    fresh = _kept.active is None or _kept.active.task != same
    if fresh:
        _kept.active = None  # its networks first
        _kept.active = _ActiveMeasurement(same)
    active = _kept.active
    assert active is not None
    rows = active.pieces.measure(task.piece)
    seconds = {"seconds": round(time.perf_counter() - start, 4)}
    return TaskResult(active.complete(rows, **seconds), active.complete(active.pieces.notes) if fresh else [])


class _ActiveMeasurement:
    """A measurement that is set up.

    Attributes:
        task: any of its tasks, but for the piece.
        pieces: the probe on its point.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        content = read(task)
        point = point_of(task, content)
        self.pieces = begin(task.probe, point)
        self._auxiliary = point.auxiliary
        self._begun: tuple[Checkpoint, Point] | None = (content, point)  # until the first rows
        self._common: dict[str, Any] = {}

    def _describe(self, content: Checkpoint, point: Point) -> dict[str, Any]:
        """The columns that all rows share, for a network that was measured: it runs."""
        task, measurement = self.task, self.task.measurement
        common = columns(task.probe, content, task.sampling, task.settings, measurement.key)
        if isinstance(content, ForeignCheckpoint) and content.quant is None:  # nothing says it but the network
            scheme, quant = quantization(point.model)
            inputs, _ = point.batches[0] if isinstance(point.batches, list) else point.batches
            if scheme == "fp" and rounded_weight(point.model, take(inputs, slice(1))):
                scheme = "quantized"
            common |= {"method": scheme, "bits": _bits(quant)}
        named = "through" in task.probe.needs
        return {**common, "through": "+".join(map(file_hash, measurement.auxiliary)) if named else None}

    def complete(self, rows: Rows, **more: Any) -> Rows:
        """The rows with the columns that say what they are about."""
        if self._begun is not None:
            self._common, self._begun = self._describe(*self._begun), None
        return [{**self._common, **self._about(row.get("network")), **row, **more} for row in rows]

    def _about(self, network: int | None) -> dict[str, Any]:
        if network is None or not isinstance(self._auxiliary, Networks):
            return {}
        return self._auxiliary.abouts[network]


class _Whole:
    """A probe that is not made of pieces, as one."""

    notes: Rows = []  # noqa: RUF012

    def __init__(self, probe: Probe, point: Point) -> None:
        self._probe = probe
        self._point = point

    def measure(self, piece: str) -> Rows:
        return self._probe(self._point)


def begin(probe: Probe, point: Point) -> Pieces:
    """Set the probe up on its point; one that is not made of pieces is a piece."""
    return probe.begin(point) if isinstance(probe, Piecewise) else _Whole(probe, point)


def read(task: Task) -> Checkpoint:
    """The checkpoint of a task.

    Raises:
        UserError: if it cannot be read, or what is to be measured is not what was planned.
    """
    measurement = task.measurement
    content = task.source.read_checkpoint(measurement.path)
    if content.header != measurement.header:
        raise UserError(
            f"'{measurement.path}' is not what it was when this command began: it was changed since, or the run.json "
            "beside it is of another run. Run the command again; if it stays so, put the right run.json there."
        )
    if key_now(task) != measurement.key:
        raise UserError(
            f"'{measurement.path}': the code of the network or of the loss, or a checkpoint beside, is not what it was "
            "when this command began, and its numbers would stand for those. Run the command again."
        )
    return content


def point_of(task: Task, content: Checkpoint) -> Point:
    """The network with the images to measure it on, and what else the probe needs.

    Raises:
        UserError: see `Checkpoint.build` and `images`.
    """
    sampling, measurement = task.sampling, task.measurement
    net = build_network(content, sampling)
    named = {need: build_network(_beside(task, need), sampling) for need in measurement.networks}
    auxiliary = Networks(task, content)
    batch = images(content, sampling)
    before = _beside(task, "previous").epoch if "previous" in named else None
    about = {"loss": sampling.loss, "seed": sampling.seed, "previous_epoch": before}
    return Point(net, batch, auxiliary=auxiliary, **about, **named)  # type: ignore[arg-type]


def _beside(task: Task, need: str) -> Checkpoint:
    """A further network's checkpoint; the teacher of many in a row is read once."""
    path = task.measurement.networks[need]
    key = (task.source, path, file_hash(path))
    if _kept.beside.get(need, (None,))[0] != key:
        _kept.beside[need] = key, task.source.read_checkpoint(path)
    return _kept.beside[need][1]


def build_network(content: Checkpoint, sampling: Sampling) -> nn.Module:
    """The network of a checkpoint, on the device that it is measured on.

    Raises:
        UserError: see `Checkpoint.build`, or if another program's network does not take these images.
    """
    device = pick_device(sampling.device)
    net = content.callable(content.build(sampling.model)).to(device)
    if all(p.ndim < 5 for p in net.parameters()):  # of volumes
        net = net.to(memory_format=torch.channels_last)
    if isinstance(content, ForeignCheckpoint):
        batches = images(content, sampling)
        inputs, _ = batches if isinstance(batches, tuple) else batches[0]
        content.check_runs(net, inputs)
        return adopt(net, inputs)
    return net


class Networks(Sequence[nn.Module]):
    """The networks in a row, each built when it is asked for: a trajectory of them may not fit into memory.

    Attributes:
        abouts: of those asked for, by place, the columns that say which checkpoint it is.
    """

    def __init__(self, task: Task, centre: Checkpoint) -> None:
        self._task = task
        self._fingerprint = centre.data["fingerprint"]
        self.abouts: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._task.measurement.auxiliary)

    def __iter__(self) -> Iterator[nn.Module]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        path, sampling = self._task.measurement.auxiliary[index], self._task.sampling
        content = self._task.source.read_checkpoint(path)
        if content.data["fingerprint"] != self._fingerprint:
            raise UserError(
                f"'{path}' was trained on other data than the first checkpoint, and a landscape is that of one data "
                "set."
            )
        self.abouts[index] = describe(content, sampling)
        return content.build(sampling.model).to(memory_format=torch.channels_last)


def images(content: Checkpoint, sampling: Sampling) -> Batch | list[Batch]:
    """Inputs and targets to measure a checkpoint on; several runs on one data set have them from memory.

    Raises:
        UserError: see `Checkpoint.sample`.
    """
    device, root = pick_device(sampling.device), sampling.data_root or content.run["data_root"]
    where = (content.data["fingerprint"], root, str(content.run.get("feed")))
    key = (*where, sampling.n_data, sampling.seed, str(device))
    if key not in _kept.batches:
        _kept.batches[key] = moved(content.sample(sampling.n_data, sampling.seed, sampling.data_root), device)
    return _kept.batches[key]


def describe(content: Checkpoint, sampling: Sampling) -> dict[str, Any]:
    """The columns that say which checkpoint a row is about, and what measured it."""
    name, code = network_code(content.header, sampling.model)
    return {
        "method": content.run["method"],
        "model": name,
        "factory": code,
        "dataset": content.data["name"],
        "bits": _bits(content.quant),
        "train_seed": content.run["seed"],
        "data": content.data["fingerprint"],
        "epoch": content.epoch,
        "checkpoint": content.sha256,
        "package": __version__,
        "torch": str(torch.__version__),
        "device": str(pick_device(sampling.device)),
        "dtype": content.dtype,
    }


def _bits(quant: dict[str, Any] | None) -> str:
    return f"W{quant['weight_bits']}A{quant['act_bits']}" if quant else "FP"


def columns(probe: Probe, content: Checkpoint, sampling: Sampling, settings: str, key: str) -> dict[str, Any]:
    """The columns that all rows of a measurement share.

    Args:
        settings, key: see `plan.settings_of` and `plan.measurement_key`.
    """
    named = {"probe": probe.name, "loss": sampling.loss, "seed": sampling.seed, "settings": settings, "key": key}
    return {**describe(content, sampling), **named}


class _Kept:
    """What a process keeps from one task to the next: a measurement that is set up, images, and the last teacher."""

    def __init__(self) -> None:
        self.active: _ActiveMeasurement | None = None
        self.batches: dict[tuple[Any, ...], Batch | list[Batch]] = {}
        self.beside: dict[str, tuple[Any, Checkpoint]] = {}


_kept = _Kept()
# Torch's switches and random state are the process's, so that threads take turns.
_one_at_a_time = threading.Lock()
