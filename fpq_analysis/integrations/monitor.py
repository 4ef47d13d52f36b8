"""Curvature while a network is trained, in any loop: rows as `measure` writes them, without checkpoint files."""

from __future__ import annotations

import math
import operator
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from fpq_analysis import records as rec
from fpq_analysis.batch import Batch
from fpq_analysis.data import Dataset
from fpq_analysis.errors import UserError, did_you_mean, going_on
from fpq_analysis.files import write_json
from fpq_analysis.forward import ForwardFunction, with_forward
from fpq_analysis.integrations.sample import draw_sample
from fpq_analysis.integrations.undisturbed import is_first_process, plain_copy, state_hash, undisturbed
from fpq_analysis.losses import LossFunction, resolve_loss
from fpq_analysis.models import model_device
from fpq_analysis.nests import moved
from fpq_analysis.pipeline.execute import begin, columns
from fpq_analysis.pipeline.plan import check_probe, measurement_key, settings_of
from fpq_analysis.pipeline.task import Sampling
from fpq_analysis.probes.point import NEEDS, Point, Probe, Rows
from fpq_analysis.progress import show_progress
from fpq_analysis.quantizers import quantization
from fpq_analysis.runs import versions
from fpq_analysis.runs.checkpoint import Checkpoint
from fpq_analysis.runs.run import MONITORED

Log = Callable[[dict[str, float], int], object]
ABOUT: dict[str, Any] = {"method": str, "model": str, "dataset": str, "bits": str, "train_seed": (int, str)}
LIVE = ("quantizers", "teacher", "previous")  # what a probe may need, of a training that goes on


class CurvatureMonitor:
    """Measures a network while it is trained: call it with the network and the number of finished epochs.

    ::

        monitor = CurvatureMonitor([HessianTrace()], (images, labels), out="runs/mine")
        for epoch in range(epochs):
            monitor(model, epoch)
            train_one_epoch(model)
        monitor(model, epochs)

    The training goes on to the same bits as without it: a copy is measured, in eval mode, and all global random states
    are put back.  (The copy has the network's forward hooks, so that those which count or collect see its passes too.)
    What cannot be measured is warned of, and the training goes on.  Of several processes, that of rank 0 measures.

    What is measured goes to `out` as the records of a run: tables, figures, `compare` and the report find it there, and
    a measurement of saved checkpoints on the same data gives the same rows.

    Args:
        probes: what to measure.
        data: (inputs, targets), tensors or nests of tensors; a map-style data set, or a DataLoader of one; an iterable
            of batches, gone through once, here (docs/data.md); or what `fpq_analysis.data.load_dataset` gives.
        out: the folder of the run.
        every: measure at the epochs that this divides.  Steps may be counted instead of epochs.
        log: called with the whole network's numbers by name, and the epoch: `wandb.log`, `mlflow.log_metrics`, ...
        n_data: so many samples are drawn by `seed`, as `measure` draws them; an iterable of batches is left after so
            many, in its own order.  None: all.
        seed: of the draw and of everything random in a measurement.
        loss, forward: as for `hessian_trace`.
        budget_seconds: of the whole training; a measurement that would exceed it, by the time it took before, is left
            out, with a warning at the first time.
        teacher: for probes that need the float network that this one started from.
        about: what the run is called in tables and figures: any of `method`, `model`, `dataset`, `bits`, `train_seed`.
        resume: go on with the records in `out`; those of epochs behind the first one seen are removed.
        overwrite: remove what records there are in `out`.

    Raises:
        UserError: for data, probes or settings that make no sense, or a folder that a monitor wrote to before.
    """

    def __init__(
        self,
        probes: Probe | Iterable[Probe],
        data: Batch | Iterable[Any] | Dataset,
        *,
        out: str | os.PathLike[str],
        every: int = 1,
        log: Log | None = None,
        n_data: int | None = 1024,
        seed: int = 0,
        loss: str | LossFunction = "cross_entropy",
        forward: ForwardFunction | None = None,
        budget_seconds: float | None = None,
        teacher: nn.Module | None = None,
        about: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        several = isinstance(probes, Iterable) and not isinstance(probes, str)
        self.probes: Sequence[Probe] = list(probes) if several else [probes]  # type: ignore[arg-type, list-item]
        self.out = Path(out)
        self.every = every
        self.log = log
        self.loss = resolve_loss(loss)
        self.forward = forward
        self.budget_seconds = budget_seconds
        self.teacher = teacher
        self.spent = 0.0
        with undisturbed():  # a DataLoader draws
            self.data = draw_sample(data, n_data, seed)
        self._about = dict(about or {})
        self._sampling = Sampling(n_data, seed, loss=self.loss.name)
        self._check(resume or overwrite)
        self._resume, self._overwrite = resume, overwrite
        self._began = False
        self._keys: dict[str, set[str]] = {probe.name: set() for probe in self.probes}
        self._last: int | None = None
        self._previous: tuple[nn.Module, str, int] | None = None
        self._cost: dict[int, float] = {}
        self._said: set[str] = set()

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Measure what is due.

        Args:
            epoch: finished epochs; 0 is before training.

        Returns:
            The whole network's numbers by name, `hessian_trace/trace` and `hessian_trace/trace_ci95`, say; empty if
            nothing was measured.
        """
        if not hasattr(epoch, "__index__") or (epoch := operator.index(epoch)) < 0:
            raise UserError(f"The epoch is {epoch!r}; it is the number of finished epochs, or steps.")
        keeps = any("previous" in probe.needs for probe in self.probes)
        if epoch == self._last or not is_first_process() or not (keeps or epoch % self.every == 0):
            return {}
        self._last = epoch
        numbers: dict[str, float] = {}
        quietly = show_progress(False)  # a training has a bar of its own
        with quietly, undisturbed(), going_on(self._fault(epoch, "the network"), f"epoch {epoch}"):
            copied = plain_copy(model)
            digest = state_hash(copied)
            if epoch % self.every == 0:
                numbers = self._measure(copied, digest, epoch)
            if self.log is not None and numbers:
                with going_on(self._fault(epoch, "log"), "log"):
                    self.log(dict(numbers), epoch)
            if keeps:
                self._previous = copied.to("cpu"), digest, epoch
        return numbers

    def frame(self) -> pd.DataFrame:
        """All that was measured (columns: `records.COLUMNS`)."""
        frames = []
        for probe in self.probes:
            found = rec.read(self.out, [self.out], probe.name)
            frames.append(found[found["settings"] == self._settings(probe)])
        return pd.concat(frames, ignore_index=True)

    def _measure(self, model: nn.Module, digest: str, epoch: int) -> dict[str, float]:
        self._begin(epoch)
        content = self._describe(model, digest, epoch)
        numbers: dict[str, float] = {}
        names = Counter(probe.name for probe in self.probes)
        for place, probe in enumerate(self.probes):
            title = probe.name if names[probe.name] == 1 else f"{probe.name}_{vars(probe).get('definition', place)}"
            if not self._has_all(probe, content, title) or not self._affords(place, title, epoch):
                continue
            with going_on(self._fault(epoch, title), title):
                start = time.perf_counter()
                try:
                    rows = self._rows(probe, model, content)
                finally:
                    self._cost[place] = time.perf_counter() - start
                    self.spent += self._cost[place]
                if not hasattr(probe, "pieces"):
                    numbers |= _numbers(title, rows)
        return numbers

    def _rows(self, probe: Probe, model: nn.Module, content: Checkpoint) -> Rows:
        """Measure and write; what stands there is read."""
        start = time.perf_counter()
        beside = {"previous": self._previous[1]} if "previous" in probe.needs and self._previous else {}
        if "teacher" in probe.needs and self.teacher is not None:
            beside["teacher"] = state_hash(self.teacher)
        pieces = list(probe.pieces(0)) if hasattr(probe, "pieces") else [""]
        settings = settings_of(probe, self._sampling)
        key = measurement_key(content.header, probe, settings, [] if hasattr(probe, "pieces") else beside)
        if key in self._keys[probe.name]:
            return [row for row in rec.read_rows(self.out / "records" / f"{probe.name}.jsonl") if row["key"] == key]
        device = model_device(model)

        def needed(need: str, network: nn.Module | None) -> nn.Module | None:
            found = plain_copy(network).to(device) if network is not None and need in probe.needs else None
            return found and with_forward(found, self.forward)

        point = Point(
            with_forward(model, self.forward),
            moved(self.data.batches, device),
            loss=self.loss,
            seed=self._sampling.seed,
            teacher=needed("teacher", self.teacher),
            previous=needed("previous", self._previous and self._previous[0]),
            previous_epoch=self._previous and self._previous[2],
        )
        at = begin(probe, point)
        rows = [row for piece in pieces for row in at.measure(piece)] + at.notes
        sampling = replace(self._sampling, device=str(device))
        common = columns(probe, content, sampling, self._settings(probe), key)
        common |= {"seconds": round(time.perf_counter() - start, 4)}
        rows = [{**common, **self._about, **row} for row in rows]
        rec.append(self.out, probe.name, rows)
        self._keys[probe.name].add(key)
        return rows

    def _settings(self, probe: Probe) -> str:
        return rec.settings_key(probe.name, settings_of(probe, self._sampling))

    def _describe(self, model: nn.Module, digest: str, epoch: int) -> Checkpoint:
        """The network as a checkpoint that is on no disk."""
        method, bits = quantization(model)
        run = {"method": method, "seed": None, "init": None}
        data = {"name": self.data.name, "fingerprint": self.data.fingerprint}
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        return Checkpoint(epoch, {"name": type(model).__name__}, bits, data, run, state, digest)

    def _has_all(self, probe: Probe, content: Checkpoint, title: str) -> bool:
        """Whether there is what the probe needs; of what will never be there, a word is said."""
        if "quantizers" in probe.needs and content.quant is None:
            self._say(title, f"{title} is not measured: it needs that {NEEDS['quantizers']}.")
            return False
        return "previous" not in probe.needs or self._previous is not None

    def _affords(self, place: int, title: str, epoch: int) -> bool:
        if self.budget_seconds is None or self.spent + self._cost.get(place, 0.0) <= self.budget_seconds:
            return True
        self._say(
            title,
            f"{title} is not measured at epoch {epoch}: measuring has taken {self.spent:.1f} s, it would take about "
            f"{self._cost.get(place, 0.0):.1f} s, and budget_seconds is {self.budget_seconds:g}.",
        )
        return False

    def _fault(self, epoch: int, title: str) -> Callable[[UserError], None]:
        return lambda fault: _warn(f"Epoch {epoch}, {title}: {fault} The training goes on.")

    def _say(self, about: str, text: str) -> None:
        if about not in self._said:
            self._said.add(about)
            _warn(text)

    def _check(self, known: bool) -> None:
        for name in self._about:
            if name not in ABOUT:
                raise UserError(
                    f"'{name}' is not among what about= may say: {', '.join(ABOUT)}{did_you_mean(name, ABOUT)}."
                )
        wrong = [f"{name}={x!r}" for name, x in self._about.items() if not isinstance(x, ABOUT[name])]
        if wrong:
            raise UserError(f"about= gives {wrong[0]}; it is to be text, and train_seed text or a whole number.")
        if not isinstance(self.every, int) or self.every < 1:
            raise UserError(
                f"every is {self.every}; measuring is at the epochs that it divides, so it is a whole number from 1 on."
            )
        if self.budget_seconds is not None and not self.budget_seconds >= 0:
            raise UserError(f"budget_seconds is {self.budget_seconds:g}, and cannot be below zero.")
        if self.log is not None and not callable(self.log):
            raise UserError(f"log is a {type(self.log).__name__}; give a function of a dictionary and an epoch.")
        if not self.probes:
            raise UserError("No probe is given, so there is nothing to measure.")
        for probe in self.probes:
            check_probe(probe)
            unfit = [need for need in probe.needs if need not in LIVE]
            if unfit:
                raise UserError(
                    f"{probe.name} needs that {NEEDS[unfit[0]]}, which a monitor has not. Measure saved checkpoints: "
                    "fpq-analyze watch DIR, or measure(DIR, probe)."
                )
            if "teacher" in probe.needs and self.teacher is None:
                raise UserError(f"{probe.name} needs {NEEDS['teacher']}: give it as teacher=.")
        if not is_first_process():
            return
        standing = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not standing.is_dir():
            raise UserError(f"'{self.out}' cannot be a folder: '{standing}' is a file. Choose another place.")
        if (self.out / "run.json").exists():
            raise UserError(
                f"'{self.out}' is a run of fpq-analyze train, whose measurements are those of its checkpoints. Choose "
                "another folder."
            )
        if not known and (self.out / MONITORED).exists():
            raise UserError(
                f"'{self.out}' holds what a monitor measured in a training before. Go on with it (resume=True), remove "
                "it (overwrite=True), or choose another folder."
            )

    def _begin(self, epoch: int) -> None:
        """Put the folder in order, once it is known that there is something to write."""
        if self._began:
            return
        self._began = True
        if self._overwrite:
            shutil.rmtree(self.out / "records", ignore_errors=True)
        for name in self._keys if self._resume else ():
            rec.drop_after(self.out, name, epoch)
            self._keys[name] = rec.done(self.out, name)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.out / MONITORED, {"checkpoints": [], "versions": versions(), "started": started})


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _numbers(title: str, rows: Rows) -> dict[str, float]:
    """The whole network's finite numbers, with half of their 95 % interval where there is one."""
    found: dict[str, float] = {}
    for row in rows:
        for column, suffix in (("value", ""), ("ci95", "_ci95")):
            number = row.get(column)
            if row["layer"] == "all" and isinstance(number, float | int) and math.isfinite(number):
                found[f"{title}/{row['quantity']}{suffix}"] = float(number)
    return found
