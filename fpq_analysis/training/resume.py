"""What a run leaves in its folder, and where a stopped one goes on (the files: `runs/`)."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpq_analysis.data import Dataset
from fpq_analysis.errors import UserError
from fpq_analysis.files import append_jsonl, atomic_write, write_json
from fpq_analysis.runs import Run, versions
from fpq_analysis.runs import checkpoint as ckpt
from fpq_analysis.schema import ResumeFile, check
from fpq_analysis.training.config import TrainConfig
from fpq_analysis.training.tensorboard import EVENTS

NOTHING = -1


def last_finished_epoch(config: TrainConfig, run: Path, *, resume: bool, overwrite: bool) -> int:
    """Epoch to go on from; `NOTHING` for a new run or one to be overwritten.  Changes nothing on disk.

    Raises:
        UserError: if the folder holds something else, a run that is not to be touched, or one that cannot go on.
    """
    if run.exists() and not (run.is_dir() and ((run / "run.json").exists() or not any(run.iterdir()))):
        raise UserError(f"'{run}' exists and is not a run. Choose another --out.")
    if resume and overwrite:
        raise UserError("--resume goes on with a run, and --overwrite deletes it; leave one of them out.")
    existing = Run(run).checkpoints
    if overwrite or not existing:
        return NOTHING
    if not resume:
        raise UserError(f"'{run}' holds a run already. Go on with --resume, or start anew with --overwrite.")
    # A run of an older version knows nothing of newer settings, and was what their defaults are.
    before, now = {**asdict(TrainConfig()), **Run(run).config}, asdict(config)
    changed = [key for key in now if now[key] != before[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"'{run}' was started with {key} = {before[key]}, and now {key} = {now[key]} is asked for. A resumed "
            "run must keep its settings; give the old ones, or another --out for the new ones."
        )
    if (run / "resume.pt").exists():
        return int(read_resume(run)["epoch"])
    if config.epochs in existing:
        return config.epochs  # the optimiser's state goes once it is not needed
    if max(existing) > 0:
        raise UserError(
            f"'{run}' cannot go on: its resume.pt, the state of the optimiser, is not there. Restore it from a copy, "
            "or train anew with --overwrite."
        )
    return NOTHING  # killed while epoch 0 was written


def read_resume(run: Path) -> dict[str, Any]:
    """The content of `resume.pt`.

    Raises:
        UserError: if it is damaged.
    """
    path = run / "resume.pt"
    content = ckpt.load_tensors(path)
    check(ResumeFile, content, f"'{path}'")
    return dict(content)


def clear_after(run: Path, done: int) -> None:
    """Remove what a kill, or a run to be overwritten, left after epoch `done`."""
    for epoch, path in Run(run).checkpoints.items():
        if epoch > done:
            path.unlink()
    if done == NOTHING:
        for name in ("manifest.json", "train.jsonl", "resume.pt"):
            (run / name).unlink(missing_ok=True)
        for events in run.glob(EVENTS):
            events.unlink()
        shutil.rmtree(run / "records", ignore_errors=True)
    else:
        kept = [row for row in Run(run).rows if row["epoch"] <= done]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        atomic_write(run / "train.jsonl", lambda file: file.write(text.encode()))


def begin(run: Path, config: TrainConfig, data: Dataset, teacher: str | None) -> None:
    """Write `run.json`.  `teacher` is the SHA-256 of the checkpoint the run starts from."""
    about = {
        "config": asdict(config),
        "data": data.describe(),
        "teacher": teacher,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(run / "run.json", about)


def check_teacher(run: Path, teacher: str | None) -> None:
    """Raise `UserError` if the run was started from another teacher than `teacher`."""
    before = Run(run).about.get("teacher", teacher)
    if before != teacher:
        raise UserError(
            f"'{run}' was started from another teacher: the run that --init names has changed since (SHA-256 "
            f"{str(before)[:12]}... then, {str(teacher)[:12]}... now). Restore it, or start anew with --overwrite."
        )


def finish_epoch(
    run: Path,
    config: TrainConfig,
    data: Dataset,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    row: dict[str, Any],
) -> None:
    """Checkpoint, row, and last the optimiser's state: an epoch counts as done once that is on disk."""
    content = {
        "epoch": epoch,
        "model": {"name": config.model, "num_classes": data.num_classes, "in_channels": data.channels},
        "quant": asdict(config.spec) if config.spec is not None else None,
        "data": data.describe(),
        "run": asdict(config),
        "state_dict": {key: value.detach().cpu() for key, value in model.state_dict().items()},
    }
    ckpt.save_checkpoint(run, content)
    append_jsonl(run / "train.jsonl", [{"epoch": epoch, **row}])
    state = {"epoch": epoch, "optimizer": optimizer.state_dict()}
    atomic_write(run / "resume.pt", lambda file: torch.save(state, file))
