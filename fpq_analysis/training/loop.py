"""The training loop: float, LSQ and FPQ, from data to checkpoints, read from top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis import checkpoint as ckpt
from fpq_analysis.data import (
    Dataset,
    Split,
    epoch_generator,
    evaluation_batches,
    load_dataset,
    training_batches,
    training_sample,
)
from fpq_analysis.devices import pick_device
from fpq_analysis.errors import UserError
from fpq_analysis.files import append_jsonl, atomic_write, read_jsonl, write_json
from fpq_analysis.models import build_model
from fpq_analysis.progress import duration
from fpq_analysis.quantizers import (
    calibrate,
    clipped_fraction,
    fused_quantizers,
    quantize,
    quantizer_parameters,
    quantizers,
)
from fpq_analysis.training.config import METHODS, TrainConfig
from fpq_analysis.training.csd import Features, check_pair, csd_loss
from fpq_analysis.training.sfp import StochasticFeaturePerturbation

# Losses are looked at this often, so that a diverged run stops soon without waiting for the device at every step.
CHECK_EVERY = 50

Log = Callable[[str], None]


def train(
    config: TrainConfig,
    run: str | Path,
    *,
    device: str = "auto",
    download: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    log: Log = print,
) -> pd.DataFrame:
    """Train one run into the folder `run`, a checkpoint before training and after every epoch.

    Args:
        resume: go on from the last finished epoch of `run`; on the same CPU the end is bit-identical to that of a run
            that was never stopped.  A finished run is left as it is.
        overwrite: throw an existing run away and start anew.
        log: called with one line of text an epoch.

    Returns:
        The rows of `train.jsonl`: epoch, losses, accuracies (fractions), lr, seconds, images_per_s, clipped_fraction.

    Raises:
        UserError: for bad input, or if the loss is not finite; the last good checkpoint stands.
    """
    run = Path(run)
    where = pick_device(device)
    done = _open_run(config, run, resume=resume, overwrite=overwrite)
    if done == config.epochs:
        log(f"{run}: all {config.epochs} epochs are done")
        return pd.DataFrame(read_jsonl(run / "train.jsonl"))

    data = load_dataset(
        config.data, config.data_root, download=download, image_size=config.image_size, seed=config.seed
    ).to(where)
    model, teacher = _start(config, data)
    if done >= 0:
        last = ckpt.read_checkpoint(run / f"epoch_{done:04d}.pt")
        ckpt.load_state(model, last.state_dict, what=f"'{config.model}'", made_with=f"'{last.model['name']}'")
    model = model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if teacher is not None:
        teacher.to(where, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]

    optimizer = make_optimizer(config, model)
    if done < 0:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "run.json", _describe(config, data))
        _finish_epoch(run, config, data, model, optimizer, 0, {"test_accuracy": accuracy(model, data, data.test)})
    elif done > 0:
        optimizer.load_state_dict(ckpt.load_tensors(run / "resume.pt")["optimizer"])

    for epoch in range(max(done, 0) + 1, config.epochs + 1):
        row = _train_epoch(config, data, model, teacher, optimizer, epoch)
        row["test_accuracy"] = accuracy(model, data, data.test)
        row["clipped_fraction"] = clipped_fraction(model)
        _finish_epoch(run, config, data, model, optimizer, epoch, row)
        left = (config.epochs - epoch) * row["seconds"]
        log(
            f"{run.name}  epoch {epoch}/{config.epochs}  loss {row['loss']:.4f}  "
            f"test {100 * row['test_accuracy']:.2f} %  {row['seconds']:.1f} s, {duration(left)} left"
        )
    (run / "resume.pt").unlink(missing_ok=True)
    return pd.DataFrame(read_jsonl(run / "train.jsonl"))


def _train_epoch(
    config: TrainConfig,
    data: Dataset,
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    epoch: int,
) -> dict[str, Any]:
    method = METHODS[config.method]
    device = data.train.labels.device
    steps = len(data.train) // min(config.batch_size, len(data.train))
    losses = torch.zeros(steps, 3, device=device)  # total, cross-entropy, distillation
    correct = torch.zeros((), dtype=torch.long, device=device)
    step_quantizers = [quantizer for _, quantizer, _ in quantizers(model)]
    lr = config.lr
    start = time.perf_counter()

    model.train()
    with ExitStack() as stack:
        stack.enter_context(fused_quantizers(model))
        if method.sfp and config.sfp_p > 0:
            gates = epoch_generator(config.seed, epoch, "sfp gates")
            noise = torch.Generator(device).manual_seed(epoch_generator(config.seed, epoch, "sfp noise").initial_seed())
            stack.enter_context(StochasticFeaturePerturbation(model, config.sfp_p, gates, noise))
        distill = method.csd and config.csd_weight > 0
        if distill:
            assert teacher is not None  # TrainConfig sees to it
            student_features = stack.enter_context(Features(model))
            teacher_features = stack.enter_context(Features(teacher))

        batches = training_batches(data, config.batch_size, seed=config.seed, epoch=epoch, augment=config.augment)
        for step, (x, y) in enumerate(batches):
            lr = cosine(config.lr, (epoch - 1) * steps + step, config.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                if distill and teacher is not None:
                    with torch.no_grad():
                        teacher(x)
                logits = model(x).float()
            ce = F.cross_entropy(logits, y)
            csd = ce.new_zeros(())
            if distill:
                csd = csd_loss(student_features.take(), teacher_features.take(), config.csd_reduction)
            loss = ce + config.csd_weight * csd

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for quantizer in step_quantizers:
                quantizer.project_()

            losses[step] = torch.stack([loss, ce, csd]).detach()
            correct += (logits.argmax(1) == y).sum()
            if step % CHECK_EVERY == CHECK_EVERY - 1:
                _check_finite(losses, step + 1, epoch, lr)
        _check_finite(losses, steps, epoch, lr)

    seconds = time.perf_counter() - start
    images = steps * min(config.batch_size, len(data.train))
    total, ce, csd = losses.double().mean(0).tolist()
    return {
        "loss": total,
        "loss_ce": ce,
        "loss_csd": csd,
        "train_accuracy": int(correct) / images,
        "lr": lr,
        "seconds": seconds,
        "images_per_s": images / seconds,
    }


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.SGD:
    """SGD in two groups: weight decay would pull a step size towards zero, that is towards clipping everything."""
    scales = quantizer_parameters(model)
    scale_ids = {id(p) for p in scales}
    weights = [p for p in model.parameters() if id(p) not in scale_ids]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def cosine(lr: float, step: int, steps: int) -> float:
    """Cosine annealing from `lr` at step 0 towards zero at `steps`."""
    return 0.5 * lr * (1 + math.cos(math.pi * step / steps))


def _check_finite(losses: Tensor, n: int, epoch: int, lr: float) -> None:
    bad = (~torch.isfinite(losses[:n, 0])).nonzero()
    if len(bad):
        raise UserError(
            f"The loss became {losses[bad[0, 0], 0].item()} at epoch {epoch}, step {int(bad[0, 0])}, learning rate "
            f"{lr:.3g}. Training stopped; the checkpoint of epoch {epoch - 1} is the last good one. Try a smaller "
            "--lr; at 2 bits also more calibration images, or --csd-weight lower for FPQ."
        )


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, split: Split) -> float:
    """Share of `split` that the model gets right, in eval mode; the mode is restored."""
    training = model.training
    model.eval()
    correct = sum((model(x).argmax(1) == y).sum() for x, y in evaluation_batches(data, split))
    model.train(training)
    return int(correct) / len(split)


def _start(config: TrainConfig, data: Dataset) -> tuple[nn.Module, nn.Module | None]:
    """The model before training, on the CPU, and the teacher (None for a float run)."""
    if config.init is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return build_model(config.model, data.num_classes, data.channels), None
    teacher_run = Path(config.init)
    if not teacher_run.is_dir():
        raise UserError(f"No run '{config.init}' to start from. Train one first: fpq-analyze train --method fp")
    epochs = ckpt.checkpoints(teacher_run)
    if not epochs:
        raise UserError(f"'{config.init}' holds no checkpoint to start from. --init wants the folder of one float run.")
    source = ckpt.read_checkpoint(epochs[max(epochs)])
    if source.quant is not None:
        raise UserError(f"'{config.init}' is a quantized run, and the teacher must be a float one (--method fp).")
    if source.model["name"] != config.model or source.data["classes"] != list(data.classes):
        raise UserError(
            f"'{config.init}' was trained as {source.model['name']} on {source.data['name']} "
            f"({len(source.data['classes'])} classes), and this run is {config.model} on {config.data} "
            f"({data.num_classes} classes). Student and teacher must be the same network on the same classes."
        )
    teacher = source.build(config.model)
    spec = config.spec
    assert spec is not None  # TrainConfig sees to it: a run with `init` has bits
    model = quantize(teacher, spec)
    images, _ = training_sample(data, config.calibration_images, config.seed)
    calibrate(model, images.cpu(), spec.act_calibration)
    check_pair(model, teacher)
    return model, teacher


def _open_run(config: TrainConfig, run: Path, *, resume: bool, overwrite: bool) -> int:
    """Last finished epoch of `run` after clearing what a kill left behind; -1 for nothing."""
    if run.exists() and not (run.is_dir() and ((run / "run.json").exists() or not any(run.iterdir()))):
        raise UserError(f"'{run}' exists and is not a run. Choose another --out.")
    existing = ckpt.checkpoints(run) if run.is_dir() else {}
    if existing and not (resume or overwrite):
        raise UserError(f"'{run}' holds a run already. Go on with --resume, or start anew with --overwrite.")
    done = -1
    if existing and not overwrite:
        _check_unchanged(config, run)
        if (run / "resume.pt").exists():
            done = int(ckpt.load_tensors(run / "resume.pt")["epoch"])
        elif config.epochs in existing:
            done = config.epochs  # the optimiser's state goes once it is not needed
    # Whatever a kill left after the last complete epoch is made again.
    for epoch, path in existing.items():
        if epoch > done:
            path.unlink()
    if done < 0:
        for name in ("manifest.json", "train.jsonl", "resume.pt"):
            (run / name).unlink(missing_ok=True)
    else:
        _keep_rows(run, done)
    return done


def _check_unchanged(config: TrainConfig, run: Path) -> None:
    before = ckpt.read_run(run)["config"]
    now = asdict(config)
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        key = changed[0]
        raise UserError(
            f"'{run}' was started with {key} = {before.get(key)}, and now {key} = {now[key]} is asked for. A resumed "
            "run must keep its settings; give the old ones, or another --out for the new ones."
        )


def _keep_rows(run: Path, done: int) -> None:
    """Cut `train.jsonl` back to the finished epochs."""
    text = "".join(json.dumps(row) + "\n" for row in read_jsonl(run / "train.jsonl") if row["epoch"] <= done)
    atomic_write(run / "train.jsonl", lambda file: file.write(text.encode()))


def _describe(config: TrainConfig, data: Dataset) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "data": _describe_data(data),
        "versions": ckpt.versions(),
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _describe_data(data: Dataset) -> dict[str, Any]:
    return {
        "name": data.name,
        "classes": list(data.classes),
        "channels": data.channels,
        "size": data.train.images.shape[-1],
        "mean": list(data.mean),
        "std": list(data.std),
        "n_train": len(data.train),
        "n_test": len(data.test),
        "fingerprint": data.fingerprint,
    }


def _finish_epoch(
    run: Path,
    config: TrainConfig,
    data: Dataset,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    row: dict[str, Any],
) -> None:
    """Checkpoint, row, and last the optimiser state: an epoch counts as done once that is on disk."""
    ckpt.save_checkpoint(
        run,
        {
            "epoch": epoch,
            "model": {"name": config.model, "num_classes": data.num_classes, "in_channels": data.channels},
            "quant": asdict(config.spec) if config.spec is not None else None,
            "data": _describe_data(data),
            "run": asdict(config),
            "state_dict": {key: value.detach().cpu() for key, value in model.state_dict().items()},
        },
    )
    append_jsonl(run / "train.jsonl", [{"epoch": epoch, **row}])
    state = {"epoch": epoch, "optimizer": optimizer.state_dict()}
    atomic_write(run / "resume.pt", lambda file: torch.save(state, file))
