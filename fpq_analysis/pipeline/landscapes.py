"""Landscapes of checkpoints on disk, kept point by point: what a kill leaves is gone on with, shards add up.

`<run>/records/landscape.jsonl`, in the run of the centre.  All rows of one landscape have one `key`.  A shard writes a
file of its own, `landscape.IofN.jsonl`, so that no two processes ever write to one; the next call without a shard
gathers these.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import pandas as pd
import torch
from torch import nn

from fpq_analysis import records as rec
from fpq_analysis.devices import peak_memory, pick_device
from fpq_analysis.errors import Fault, UserError, going_on, raise_fault
from fpq_analysis.pipeline.measurement import (
    FORECAST_IMAGES,
    Sampler,
    Source,
    build_network,
    check_n_data,
    describe,
    measurement_key,
    source_of,
)
from fpq_analysis.probes.landscape.recipe import Recipe
from fpq_analysis.probes.landscape.survey import Cell, Survey, check_others, quantity
from fpq_analysis.probes.point import Rows
from fpq_analysis.progress import Progress
from fpq_analysis.runs import file_hash
from fpq_analysis.runs.checkpoint import Checkpoint

# Seconds of work a kill may cost; writing every point at once would cost a fast device more than the loss itself.
FLUSH = 2.0
# Two computations of one direction agree better than this, in its signature.
SAME = 1e-2

Shard = tuple[int, int]


@dataclass(frozen=True)
class Job:
    """One landscape.

    Attributes:
        run: where its records go.
        path: the centre; others: further checkpoints on its plane, in the order of `Survey`.
        cells: grid points to do; n_cells: all of this shard's.
    """

    run: Path
    path: Path
    others: tuple[Path, ...]
    key: str
    cells: list[Cell]
    n_cells: int


@dataclass(frozen=True)
class Plan:
    """What `measure_landscapes` would do.

    Attributes:
        root: folder from which runs are named.
        source: how the files in it are read.
        settings: hash of all that does not depend on the checkpoints.
        faults: what cannot be measured, with the reason.
    """

    root: Path
    source: Source
    settings: str
    jobs: list[Job]
    faults: list[tuple[Path, UserError]]


def plan(
    ckpt_dir: str | os.PathLike[str],
    recipe: Recipe,
    *,
    through: Sequence[str | Path] = (),
    epoch: int | None = None,
    n_data: int | None = 512,
    seed: int = 0,
    shard: Shard = (1, 1),
    overwrite: bool = False,
    model: str | None = None,
    records: str | os.PathLike[str] | None = None,
) -> Plan:
    """List the landscapes and the grid points of each that are not there; see `measure_landscapes`.

    Raises:
        UserError: if there is no checkpoint, or `n_data` is too small for an error over the data.
    """
    check_n_data(n_data)
    if (recipe.plane == "checkpoints") != bool(through):
        raise UserError(
            "A plane of checkpoints goes through those named: plane='checkpoints' with two or three of them in "
            "through (--through A --through B); other planes have none."
        )
    settings = {**asdict(recipe), "version": recipe.version, "n_data": n_data, "seed": seed}
    source = source_of(ckpt_dir)
    if through:
        ends = [_one(source, Path(path), epoch) for path in through]
        root, groups = ends[0].parent.parent, [(ends[0], tuple(ends[1:]))]
        faults: list[tuple[Path, UserError]] = []
    else:
        root = Path(ckpt_dir)
        groups, faults = _groups(source, root, recipe, epoch)
    homes = {path: rec.home(root, path.parent, records) for path, _ in groups}
    root = Path(records) if records else root
    todo = Plan(root, source, rec.settings_key(recipe.name, settings), [], faults)
    cells = list(itertools.product(range(recipe.points), repeat=recipe.dim))[shard[0] - 1 :: shard[1]]
    for path, others in groups:
        with going_on(partial(_note, faults, path), f"'{path}'"):
            check_others(recipe, len(others))
            key = measurement_key(source.header(path), recipe.name, settings, list(map(file_hash, others)), model)
            done = set() if overwrite else set(_rows(root, homes[path], recipe, key)["quantity"])
            left = [cell for cell in cells if quantity("rise", cell) not in done]
            todo.jobs.append(Job(homes[path], path, others, key, left, len(cells)))
    return todo


def _note(faults: list[tuple[Path, UserError]], path: Path, fault: UserError) -> None:
    faults.append((path, fault))


def _one(source: Source, path: Path, epoch: int | None) -> Path:
    """A checkpoint file, or the one of a run."""
    if path.is_file():
        return path
    found = source.checkpoints(path) if path.is_dir() else {}
    if not found:
        raise UserError(f"'{path}' is neither a checkpoint nor a run that holds some.")
    return found[_at(path, found, epoch)]


def _at(run: Path, found: dict[int, Path], epoch: int | None) -> int:
    """The epoch asked for, or the last."""
    if epoch is not None and epoch not in found:
        raise UserError(f"'{run}' has no checkpoint of epoch {epoch}; it has {min(found)} to {max(found)}.")
    return max(found) if epoch is None else epoch


def _groups(
    source: Source, root: Path, recipe: Recipe, epoch: int | None
) -> tuple[list[tuple[Path, tuple[Path, ...]]], list[tuple[Path, UserError]]]:
    """Centre and other checkpoints of every run's landscape."""
    groups: list[tuple[Path, tuple[Path, ...]]] = []
    faults: list[tuple[Path, UserError]] = []
    for run in source.find_runs(root):
        with going_on(partial(_note, faults, run), f"'{run}'"):
            found = source.checkpoints(run)
            if not found:  # a folder of exports, say
                continue
            centre = _at(run, found, epoch)
            before = tuple(path for number, path in found.items() if number < centre) if recipe.plane == "pca" else ()
            groups.append((found[centre], before))
    return groups, faults


def measure_landscapes(
    ckpt_dir: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    through: Sequence[str | Path] = (),
    epoch: int | None = None,
    n_data: int | None = 512,
    seed: int = 0,
    shard: Shard = (1, 1),
    overwrite: bool = False,
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
    records: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """The landscape about the last checkpoint of every run at or below `ckpt_dir`; points on disk are not done again.

    All runs see the same `n_data` training images (None: all), drawn by `seed`, without augmentation; of one
    architecture they also get the same random directions, before normalisation.

    Args:
        ckpt_dir: a run, or a folder of runs; for another program's checkpoints a `ForeignRuns`.
        recipe: how to draw it; None for the default.
        through: for planes of checkpoints, two or three files or runs (their last checkpoint), the centre first;
            `ckpt_dir` then has no part, but that a `ForeignRuns` says how they are read.
        epoch: another checkpoint than the last.
        shard: (i, n), every n-th point beginning with the i-th; call without it afterwards to gather the shards.
        data_root: where the data set lies, if not where it was when the run was trained.
        model: for a network of your own, `package.module:factory`.
        records: see `measure`.

    Returns:
        The records of these landscapes (columns: `records.COLUMNS`; quantities: `survey.py`).

    Raises:
        UserError: if there is no checkpoint, the data are missing, or a checkpoint cannot be measured.
    """
    recipe = recipe or Recipe()
    sample: dict[str, Any] = {"n_data": n_data, "seed": seed, "shard": shard, "model": model}
    todo = plan(ckpt_dir, recipe, through=through, epoch=epoch, overwrite=overwrite, records=records, **sample)
    return carry_out(todo, recipe, device=device, data_root=data_root, **sample)


def carry_out(
    todo: Plan,
    recipe: Recipe,
    *,
    n_data: int | None,
    seed: int,
    shard: Shard = (1, 1),
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
    on_fault: Fault | None = None,
) -> pd.DataFrame:
    """Do what `plan` listed; see `measure_landscapes`.

    Args:
        on_fault: called with each checkpoint that cannot be measured and why; the others go on.  None: raise.
    """
    report = on_fault or raise_fault
    for path, fault in todo.faults:
        report(path, fault)
    sample = Sampler(n_data, seed, data_root, pick_device(device))
    with Progress(sum(len(job.cells) for job in todo.jobs), recipe.name) as progress:
        for job in todo.jobs:
            with going_on(partial(report, job.path), f"'{job.path}'"):
                _do(job, todo, recipe, sample, seed=seed, shard=shard, model=model, progress=progress)
    frames = []
    for job in todo.jobs:
        with going_on(partial(report, job.path), f"'{job.path}'"):
            frames.append(_rows(todo.root, job.run, recipe, job.key))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(rec.COLUMNS))


def _do(
    job: Job,
    todo: Plan,
    recipe: Recipe,
    sample: Sampler,
    *,
    seed: int,
    shard: Shard,
    model: str | None,
    progress: Progress,
) -> None:
    file = recipe.name if shard[1] == 1 else f"{recipe.name}.{shard[0]}of{shard[1]}"
    before = _rows(todo.root, job.run, recipe, job.key)
    if shard[1] == 1:
        _gather(todo.root, job, recipe, before)
    if not job.cells:
        return
    content = todo.source.read_checkpoint(job.path)
    survey = _survey(job, todo.source, content, recipe, sample, seed=seed, model=model)
    common = {
        **describe(content, model, sample.device),
        "probe": recipe.name,
        "seed": seed,
        "settings": todo.settings,
        "key": job.key,
        "through": "+".join(map(file_hash, job.others)) if recipe.plane == "checkpoints" else None,
    }
    if "axis_1" in set(before["quantity"]):
        _check_same(survey, before)
    else:
        rows = [*survey.notes, *survey.measure_points()]
        rec.append(job.run, file, [{**common, **row} for row in rows])
    waiting: Rows = []
    written = time.monotonic()
    try:
        for cell in job.cells:
            start = time.monotonic()
            rows = survey.measure_cell(cell)
            waiting += [{**common, **row, "seconds": round(time.monotonic() - start, 4)} for row in rows]
            if time.monotonic() - written > FLUSH:
                done, waiting = waiting, []
                rec.append(job.run, file, done)
                written = time.monotonic()
            progress.advance()
    finally:
        if waiting:
            rec.append(job.run, file, waiting)


def _survey(
    job: Job, source: Source, content: Checkpoint, recipe: Recipe, sample: Sampler, *, seed: int, model: str | None
) -> Survey:
    others = _Networks(source, job.others, content, model)
    abouts = [describe(one, model, sample.device) for one in map(source.read_checkpoint, job.others)]
    centre = describe(content, model, sample.device)
    abouts = [*abouts, centre] if recipe.plane == "pca" else [centre, *abouts]
    net = build_network(content, model, sample)
    return Survey(net, sample(content), recipe, others=others, abouts=abouts, seed=seed)


class _Networks(Sequence[nn.Module]):
    """The networks of checkpoints, each built when it is asked for: a trajectory of them may not fit into memory."""

    def __init__(self, source: Source, paths: Sequence[Path], centre: Checkpoint, model: str | None) -> None:
        self.source = source
        self.paths = paths
        self.centre = centre
        self.model = model

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[nn.Module]: ...

    def __getitem__(self, index: int | slice) -> nn.Module | Sequence[nn.Module]:
        if isinstance(index, slice):
            return _Networks(self.source, self.paths[index], self.centre, self.model)
        content = self.source.read_checkpoint(self.paths[index])
        if content.data["fingerprint"] != self.centre.data["fingerprint"]:
            raise UserError(
                f"'{self.paths[index]}' was trained on other data than the first checkpoint, and a landscape is that "
                "of one data set."
            )
        return content.build(self.model).to(memory_format=torch.channels_last)


def _check_same(survey: Survey, before: pd.DataFrame) -> None:
    """Raise `UserError` if the directions are not those of the points measured before."""
    recorded = before.set_index("quantity")["value"]
    for row in survey.notes:
        if row["quantity"].startswith("signature_"):
            was = float(recorded[row["quantity"]])
            if abs(row["value"] - was) > SAME * max(1.0, abs(was)):
                raise UserError(
                    "The directions of this landscape come out otherwise than when it was begun (another machine or "
                    "release of torch, perhaps), so its points would not fit together. Draw it anew with --overwrite, "
                    "all shards in one place."
                )


def _rows(root: Path, run: Path, recipe: Recipe, key: str) -> pd.DataFrame:
    """What is on disk of one landscape, shards included."""
    frames = [rec.read(root, [run], file, {key}) for file in (recipe.name, *_shards(run, recipe))]
    frames = [frame for frame in frames if len(frame)] or frames[:1]
    return pd.concat(frames, ignore_index=True).drop_duplicates(["layer", "quantity"], keep="first", ignore_index=True)


def _shards(run: Path, recipe: Recipe) -> Iterator[str]:
    """Names of the files of shards, without suffix."""
    return (path.stem for path in sorted((run / "records").glob(f"{recipe.name}.*of*.jsonl")))


def _gather(root: Path, job: Job, recipe: Recipe, rows: pd.DataFrame) -> None:
    """Write into the run's own file what only shards have."""
    own = rec.read(root, [job.run], recipe.name, {job.key})
    have = set(zip(own["layer"], own["quantity"], strict=True))
    new = [row for row in rows.to_dict("records") if (row["layer"], row["quantity"]) not in have]
    if new:
        rec.append(job.run, recipe.name, [_plain(row) for row in new])


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    """A row of a table as it was before pandas: None where nothing is."""
    return {str(k): None if isinstance(v, float) and v != v else v for k, v in row.items() if k != "run"}


def forecast(
    todo: Plan,
    recipe: Recipe,
    *,
    n_data: int | None = 512,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
) -> pd.DataFrame:
    """Time two points of every pending landscape on few images and extrapolate; nothing is recorded.

    Returns:
        A row a landscape: run, grid points to do, seconds for all of them, peak memory so far in MB.
    """
    few = FORECAST_IMAGES if n_data is None else min(n_data, FORECAST_IMAGES)
    sample = Sampler(few, seed, data_root, pick_device(device))
    rows = []
    for job in todo.jobs:
        if not job.cells:
            continue
        content = todo.source.read_checkpoint(job.path)
        start = time.perf_counter()
        survey = _survey(job, todo.source, content, recipe, sample, seed=seed, model=model)
        placed = time.perf_counter()
        for cell in survey.cells[:2]:
            survey.measure_cell(cell)
        once = (time.perf_counter() - placed) / 2
        n = n_data or content.data["n_train"]
        passes = len(job.cells) + 2 * len(survey.points)
        seconds = (placed - start + once * passes) * n / few
        rows.append((rec.run_name(todo.root, job.run), len(job.cells), seconds, peak_memory()))
    return pd.DataFrame(rows, columns=["run", "to do", "seconds", "peak MB"])
