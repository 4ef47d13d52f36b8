"""What is to be measured: checkpoints x a probe, less what stands in the records.  Torch is not needed for it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fpq_analysis import records as rec
from fpq_analysis.errors import UserError, going_on
from fpq_analysis.pipeline import store
from fpq_analysis.pipeline.task import WHOLE, PlannedMeasurement, Sampling, Shard, Task
from fpq_analysis.runs import MONITORED, Header, Run, Source, file_hash, source_of
from fpq_analysis.runs.factories import factory_name, source_hash

if TYPE_CHECKING:
    from fpq_analysis.probes import Probe

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What `run` would do.

    Attributes:
        root: the folder from which runs are named.
        source: how the files in it are read.
        settings: hash of all that does not depend on the checkpoint.
        shard: which part of the work this is the plan of.
        overwrite: whether what was measured is measured again.
        homes: of every run, the folder whose `records/` holds its rows.
        measurements: to do, in order.
        done: keys of those that are complete.
        n_done: pieces that are done.
        faults: files that cannot be measured, with the reason.
    """

    root: Path
    source: Source
    probe: Probe
    sampling: Sampling
    settings: str
    shard: Shard
    overwrite: bool
    homes: list[Path]
    measurements: list[PlannedMeasurement]
    done: set[str]
    n_done: int
    faults: list[tuple[Path, UserError]]

    @property
    def n_left(self) -> int:
        """Pieces to do."""
        return sum(len(measurement.pieces) for measurement in self.measurements)

    def tasks(self) -> Iterator[Task]:
        """What is to do, one piece each, those of a measurement side by side."""
        for measurement in self.measurements:
            for piece in measurement.pieces:
                yield Task(self.source, self.probe, self.sampling, measurement, self.settings, piece)


def plan(
    ckpt_dir: str | os.PathLike[str],
    probe: Probe,
    sampling: Sampling | None = None,
    *,
    epochs: str = "all",
    through: Sequence[str | Path] = (),
    shard: Shard = WHOLE,
    overwrite: bool = False,
    records: str | os.PathLike[str] | None = None,
) -> Plan:
    """List the measurements of `probe` on the checkpoints at or below `ckpt_dir` that have what the probe needs.

    No weights are read, but of files whose run does not describe them.

    Args:
        epochs, through, shard, overwrite, records: see `measure`.

    Raises:
        UserError: if there is no checkpoint, `epochs` makes no sense, or there is no such model or loss.
    """
    check_probe(probe)
    sampling = sampling or Sampling()
    if sampling.model is not None:
        from fpq_analysis.models import find_factory

        find_factory(sampling.model)  # an error of the command, not of each file
    if sampling.loss != Sampling.loss:
        from fpq_analysis.losses import resolve_loss

        resolve_loss(sampling.loss)
    if ("through" in probe.needs) != bool(through):
        raise UserError(
            "A plane of checkpoints goes through those named: plane='checkpoints' with two or three of them in "
            "through (--through A --through B); other planes have none."
        )
    source = source_of(ckpt_dir).on_sample(sampling.n_data, sampling.seed)
    faults: list[tuple[Path, UserError]] = []
    if through:
        ends = [_one(source, Path(end), epochs) for end in through]
        run = ends[0].parent
        root, chosen = run.parent, {run: ends[:1]}
        found: dict[Path, dict[int, Path]] = {run: {}}
        live = set()
    else:
        ends, root = [], Path(ckpt_dir)
        found = _find(source, root, faults)
        chosen = {run: list(choose_epochs(paths, epochs).values()) for run, paths in found.items()}
        live = {run for run, paths in found.items() if not paths and (run / MONITORED).exists()}
        if not any(chosen.values()) and not faults and not live:
            last = max((max(paths) for paths in found.values() if paths), default=0)
            raise UserError(f"No run in '{root}' has a checkpoint of epoch {epochs}; their last is {last}.")
    settings = settings_of(probe, sampling)
    homes = {run: rec.home(root, run, records) for run in chosen}
    turns = itertools.count()
    measurements: list[PlannedMeasurement] = []
    done: set[str] = set()
    n_done = 0
    hashed = rec.settings_key(probe.name, settings)
    for run, paths in chosen.items():
        if run in live:
            with going_on(_into(faults, run), f"'{run}'"):
                done |= _monitored(run, homes[run], probe.name, hashed, epochs)
            continue
        with going_on(_into(faults, run), f"'{run}'"):
            there = {} if overwrite else store.recorded(homes[run], probe.name)
            for path in paths:
                with going_on(_into(faults, path), f"'{path}'"):
                    header = source.header(path)
                    needed = _needed(probe, run, header, found[run], ends[1:])
                    if needed is None:
                        continue
                    networks, auxiliary = needed
                    beside = _hashes(probe, networks, auxiliary)
                    key = measurement_key(header, probe, settings, beside, sampling.model)
                    known = there.get(key, {})
                    mine = [piece for piece in _pieces(probe, auxiliary) if next(turns) % shard[1] == shard[0] - 1]
                    left = tuple(piece for piece in mine if key not in there or (piece and piece not in known))
                    n_done += len(mine) - len(left)
                    if left:
                        signature = {name: known[name] for name in known if name.startswith(store.SIGNATURE)}
                        about = (run, homes[run], path, header, key, networks, auxiliary)
                        measurements.append(PlannedMeasurement(*about, left, signature))
                    elif mine:
                        done.add(key)
    settled = Path(records) if records else root, source, probe, sampling, hashed
    return Plan(*settled, shard, overwrite, list(homes.values()), measurements, done, n_done, faults)


def _find(source: Source, root: Path, faults: list[tuple[Path, UserError]]) -> dict[Path, dict[int, Path]]:
    """Every run's checkpoints, by epoch."""
    found = {}
    for run in source.find_runs(root):
        with going_on(_into(faults, run), f"'{run}'"):
            found[run] = source.checkpoints(run)
    return found


def _monitored(run: Path, home: Path, probe: str, settings: str, epochs: str) -> set[str]:
    """Keys of what a monitor measured with these settings, the newest of every epoch asked for.

    Raises:
        UserError: if there is nothing, and nothing can be measured any more.
    """
    rows = rec.read_rows(home / "records" / f"{probe}.jsonl")
    keys = {row["epoch"]: row["key"] for row in rows if row.get("settings") == settings}
    chosen = set(choose_epochs(dict(sorted(keys.items())), epochs).values())
    if not chosen:
        raise UserError(
            f"'{run}' was measured by a monitor while it was trained, and holds no checkpoint to measure. Of {probe} "
            f"with these settings and epochs ({epochs}) it has no records"
            + (": give the --n-data, --seed and settings of the monitor." if rows else ".")
        )
    return chosen


def _into(faults: list[tuple[Path, UserError]], path: Path) -> Callable[[UserError], None]:
    return lambda fault: faults.append((path, fault))


def _one(source: Source, path: Path, epochs: str) -> Path:
    """A checkpoint file, or of a run the last of those asked for."""
    if path.is_file():
        return path
    found = source.checkpoints(path) if path.is_dir() else {}
    if not found:
        raise UserError(f"'{path}' is neither a checkpoint nor a run that holds some.")
    chosen = list(choose_epochs(found, epochs).values())
    if not chosen:
        raise UserError(f"'{path}' has no checkpoint of epoch {epochs}; it has {min(found)} to {max(found)}.")
    return chosen[-1]


def choose_epochs(found: dict[int, T], epochs: str) -> dict[int, T]:
    """Of a run's checkpoints, by epoch, those asked for.

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


def _needed(
    probe: Probe, run: Path, header: Header, found: dict[int, Path], ends: list[Path]
) -> tuple[dict[str, Path], tuple[Path, ...]] | None:
    """Files of the networks that the probe needs, by need and in a row; None if this checkpoint has not all of them."""
    before = [path for epoch, path in found.items() if epoch < header.epoch]
    networks: dict[str, Path | None] = {}
    auxiliary: list[Path] = []
    for need in probe.needs:
        if need == "quantizers" and not header.quantized:
            return None
        if need == "teacher":
            networks[need] = Run(run).teacher if header.init else None
        elif need == "previous":
            networks[need] = before[-1] if before else None
        elif need == "trajectory":
            auxiliary = before
        elif need == "through":
            auxiliary = ends
    there = {need: path for need, path in networks.items() if path is not None}
    return (there, tuple(auxiliary)) if len(there) == len(networks) else None


def _pieces(probe: Probe, auxiliary: tuple[Path, ...]) -> Sequence[str]:
    """See `probes.point.Piecewise`, which is not asked for here as it would bring torch."""
    return probe.pieces(len(auxiliary)) if hasattr(probe, "pieces") else [""]


def _hashes(probe: Probe, networks: dict[str, Path], auxiliary: tuple[Path, ...]) -> dict[str, str] | list[str]:
    """The hashes of the files that a measurement needs beside its checkpoint."""
    if hasattr(probe, "pieces"):
        return list(map(file_hash, auxiliary))
    return {need: file_hash(path) for need, path in networks.items()}


def key_now(task: Task) -> str:
    """The key that its measurement would be planned with now, in this process: of the code and files that it finds."""
    measurement, sampling = task.measurement, task.sampling
    beside = _hashes(task.probe, measurement.networks, measurement.auxiliary)
    return measurement_key(measurement.header, task.probe, settings_of(task.probe, sampling), beside, sampling.model)


def check_probe(probe: object) -> None:
    """Raise `UserError` unless it is a probe, and not its class or its name."""
    if isinstance(probe, type) or not (is_dataclass(probe) and hasattr(probe, "needs")):
        found = f"the class {probe.__name__}" if isinstance(probe, type) else repr(probe)[:80]
        raise UserError(f"What is to be measured is a probe with its settings, HessianTrace() say, and not {found}.")


def settings_of(probe: Probe, sampling: Sampling) -> dict[str, Any]:
    """What decides the numbers of every checkpoint alike: the probe with its settings, and the sample."""
    settings = {**asdict(probe), "version": probe.version}  # type: ignore[call-overload]
    settings |= {"n_data": sampling.n_data, "seed": sampling.seed}
    if sampling.loss == Sampling.loss:
        return settings
    return settings | {"loss": sampling.loss} | _loss_code(sampling.loss)


def _loss_code(name: str) -> dict[str, str]:
    """The hash of the code of a loss of the user's own, if it can be imported."""
    if ":" not in name:
        return {}
    from fpq_analysis.losses import resolve_loss

    try:
        return {"loss_code": source_hash(resolve_loss(name).per_sample)}
    except UserError:  # of a function that has no name, in a training loop
        return {}


def measurement_key(
    header: Header,
    probe: Probe,
    settings: dict[str, Any],
    beside: dict[str, str] | list[str],
    model: str | None = None,
) -> str:
    """Key of a measurement: it holds whatever decides the numbers.

    Args:
        settings: see `settings_of`.
        beside: hashes of the further networks that the probe needs: by need, or of a probe made of pieces, in a row.
        model: see `Sampling`.
    """
    name, code = network_code(header, model)
    about = {"epoch": header.epoch, "data": header.data, "network": name, "factory": code, **header.stated}
    return rec.measurement_key(header.sha256, probe.name, {**settings, **about, "others": beside})


def network_code(header: Header, model: str | None) -> tuple[str, str | None]:
    """The name of the network that a checkpoint is measured as, and the hash of the code that makes it.

    None for a network of this package, which goes by the probe's version, and for one of the user's that `model` does
    not allow to import: it cannot be measured.

    Raises:
        UserError: if the factory cannot be imported.
    """
    factory = header.model if header.stated else model or header.model  # what was said of a foreign file holds
    name = factory if isinstance(factory, str) else factory_name(factory)
    if not (header.stated or model is not None):
        return name, None
    from fpq_analysis.models import MODELS, find_factory

    if factory in MODELS:
        return name, None
    return name, source_hash(find_factory(factory) if isinstance(factory, str) else factory)
