"""The training loop of every method, from data to checkpoints, read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.data import Dataset, Split, evaluation_batches, load_dataset, training_batches, training_sample
from fpq_analysis.devices import pick_device
from fpq_analysis.errors import UserError
from fpq_analysis.models import build_model
from fpq_analysis.nests import split
from fpq_analysis.quantizers import (
    calibrate,
    changed_fraction,
    clipped_fraction,
    fused_quantizers,
    quantize,
    quantizer_parameters,
    step_sizes,
    weight_codes,
)
from fpq_analysis.ranks import added, dividing, mean_over_ranks, n_ranks, on_first
from fpq_analysis.ranks.leading import leading, together
from fpq_analysis.runs import Run
from fpq_analysis.runs import checkpoint as ckpt
from fpq_analysis.text import duration
from fpq_analysis.training.config import TrainConfig, check_init
from fpq_analysis.training.projection import ScaleProjection
from fpq_analysis.training.regularizer import Regularizer, regularizers
from fpq_analysis.training.resume import (
    NOTHING,
    begin,
    check_teacher,
    clear_after,
    finish_epoch,
    last_finished_epoch,
    read_resume,
)
from fpq_analysis.training.tensorboard import EventLog

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
    dataset: Dataset | None = None,
    tensorboard: bool = False,
    log: Log = print,
) -> pd.DataFrame:
    """Train one run into the folder `run`, a checkpoint before training and after every epoch.

    Under torchrun, or inside `over_ranks()`, every batch is divided over the ranks, and gradients are added up.  Each
    rank's BatchNorm has the statistics of its own images; a checkpoint has their mean over the ranks.

    Args:
        config: what is trained, on which data, and how.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        download: fetch CIFAR into `config.data_root` if it is not there.
        resume: go on from the last finished epoch of `run`; on the same CPU the end is bit-identical to that of a run
            that was never stopped.  A finished run is left as it is.
        overwrite: throw an existing run away and start anew.
        tensorboard: write the rows as scalars into the run's folder, too, for TensorBoard.
        dataset: the data set that `config` names, if it is in memory already.
        log: called with one line of text an epoch.

    Returns:
        The rows of `train.jsonl`: epoch; loss; its terms as weighted in it, `loss_ce` and the method's own; accuracies
        (fractions); lr; seconds; images_per_s; clipped_fraction and oscillating_fraction of the quantized weights
        (outside their grid; on another level of it than an epoch before); step_sizes, see `quantizers.step_sizes`.

    Raises:
        UserError: for bad input, or if the loss is not finite; the last good checkpoint stands.
    """
    how = partial(_train, config, Path(run), device, download, resume, overwrite, tensorboard)
    if leading():  # the others know the run by its config, and load the data themselves
        return together(partial(how, None, log))
    return how(dataset, log)


def _train(
    config: TrainConfig,
    run: Path,
    device: str,
    download: bool,
    resume: bool,
    overwrite: bool,
    tensorboard: bool,
    dataset: Dataset | None,
    log: Log,
) -> pd.DataFrame:
    """On every rank, of which the first reads and writes the folder."""
    where = pick_device(device)
    events = EventLog(run) if tensorboard else None
    least = config.batch_size // (n_ranks() * config.accumulate)
    if dividing() and least < 2:
        raise UserError(
            f"A batch of {config.batch_size} on {n_ranks()} ranks in {config.accumulate} part(s) leaves {least} to a "
            "part, and BatchNorm needs 2. Choose a larger --batch-size, fewer ranks, or a smaller --accumulate."
        )
    done = on_first(lambda: last_finished_epoch(config, run, resume=resume, overwrite=overwrite))
    if done == config.epochs:
        on_first(lambda: log(f"{run}: all {config.epochs} epochs are done"))
        rows = Run(run).rows
        if not rows:
            raise UserError(
                f"'{run / 'train.jsonl'}' is not there, or empty. Restore it from a copy, or train anew with "
                "--overwrite."
            )
        if events is not None:
            on_first(lambda: events.add(rows))
            on_first(events.close)
        return pd.DataFrame(rows)

    if dataset is None:
        dataset = load_dataset(config.data, config.data_root, download=download, image_size=config.image_size)
    data = dataset.to(where)
    model, teacher, teacher_hash = _start(config, data)
    method = regularizers(config, model, teacher)
    # Everything was checked; from here on the folder is written to.
    on_first(lambda: run.mkdir(parents=True, exist_ok=True))
    if done != NOTHING:
        check_teacher(run, teacher_hash)
        last = ckpt.read_checkpoint(run / f"epoch_{done:04d}.pt")
        ckpt.load_state(model, last.state_dict, what=f"'{config.model}'", whose=ckpt.made_with(last.model["name"]))
    on_first(lambda: clear_after(run, done))
    model = model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if teacher is not None:
        teacher.to(where, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    if config.compile:
        model.compile()
    optimizer = make_optimizer(config, model)
    if done == NOTHING:
        on_first(lambda: begin(run, config, data, teacher_hash))
        row: dict[str, Any] = {"test_accuracy": accuracy(model, data, data.test)}
        on_first(lambda: finish_epoch(run, config, data, model, optimizer, 0, row))
        done = 0
    else:
        _load_optimizer(optimizer, run)

    for epoch in range(done + 1, config.epochs + 1):
        codes = weight_codes(model)
        row = _train_epoch(config, data, model, teacher, method, optimizer, epoch)
        mean_over_ranks(b for b in model.buffers() if b.is_floating_point())
        row["test_accuracy"] = accuracy(model, data, data.test)
        row["clipped_fraction"] = clipped_fraction(model)
        row["oscillating_fraction"] = changed_fraction(codes, weight_codes(model))
        row["step_sizes"] = step_sizes(model)
        left = (config.epochs - epoch) * row["seconds"]
        line = (
            f"{run.name}  epoch {epoch}/{config.epochs}  loss {row['loss']:.4f}  "
            f"test {100 * row['test_accuracy']:.2f} %  {row['seconds']:.1f} s, {duration(left)} left"
        )
        on_first(lambda: finish_epoch(run, config, data, model, optimizer, epoch, row))  # noqa: B023 -- called at once
        on_first(lambda: log(line))  # noqa: B023
        if events is not None:
            on_first(lambda: events.add(Run(run).rows))
    if events is not None:
        on_first(events.close)
    on_first(lambda: (run / "resume.pt").unlink(missing_ok=True))
    return pd.DataFrame(Run(run).rows)


def _load_optimizer(optimizer: torch.optim.Optimizer, run: Path) -> None:
    state = read_resume(run)["optimizer"]
    try:
        optimizer.load_state_dict(state)
        for parameter, kept in optimizer.state.items():
            for value in kept.values():
                if isinstance(value, Tensor) and value.ndim > 0 and value.shape != parameter.shape:
                    raise ValueError("a tensor of another shape")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"'{run / 'resume.pt'}' is damaged, or of another run: it does not fit the network. Restore it from a "
            "copy, or train anew with --overwrite."
        ) from error


def _train_epoch(
    config: TrainConfig,
    data: Dataset,
    model: nn.Module,
    teacher: nn.Module | None,
    method: list[Regularizer],
    optimizer: torch.optim.SGD,
    epoch: int,
) -> dict[str, Any]:
    device = data.train.labels.device
    size = min(config.batch_size, len(data.train))
    steps = len(data.train) // size
    history: list[Tensor] = []  # the terms of the loss, (terms,) a step
    correct = torch.zeros((), dtype=torch.long, device=device)
    project = ScaleProjection(model, optimizer)
    guide = teacher if any(part.uses_teacher for part in method) else None
    lr = config.lr
    start = time.perf_counter()

    def forward(x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the loss by name, and the logits (B, C)."""
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            with torch.inference_mode():
                wanted = guide(x).float() if guide is not None else None
            with compiling():
                logits = model(x).float()
        terms = {"ce": F.cross_entropy(logits, y)}
        for part in method:
            terms |= part.losses(logits, wanted)
        return terms, logits

    def gradient(x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Leave the gradient over a batch in `.grad`; the terms' means, and how many images are right.

        What is given is this rank's share, and gone through in parts.
        """
        optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        hits = torch.zeros_like(correct)

        def parts() -> Iterator[None]:
            nonlocal hits
            for images, labels in split((x, y), -(-len(x) // config.accumulate)):
                terms, logits = forward(images, labels)
                weight = len(images) / size
                (torch.stack(list(terms.values())).sum() * weight).backward()
                for name, term in terms.items():
                    means[name] = means.get(name, 0.0) + term.detach() * weight
                hits += (logits.argmax(1) == labels).sum()
                yield

        added(parts(), (p.grad for p in model.parameters() if p.grad is not None))
        return means, hits

    model.train()
    with ExitStack() as stack:
        stack.enter_context(fused_quantizers(model))
        for part in method:
            stack.enter_context(part.during(epoch))
        batches = training_batches(data, config.batch_size, seed=config.seed, epoch=epoch, augment=config.augment)
        for step, (x, y) in enumerate(batches):
            lr = cosine(config.lr, (epoch - 1) * steps + step, config.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            terms, hits = gradient(x, y)
            for moved in filter(None, (part.second_pass() for part in method)):
                with moved:  # the gradient there, in place of this one
                    gradient(x, y)
            optimizer.step()
            project()

            history.append(torch.stack(list(terms.values())))
            correct += hits
            if step % CHECK_EVERY == CHECK_EVERY - 1:
                _check_finite(history, epoch, lr)
        _check_finite(history, epoch, lr)
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:  # by the last step, after the last loss
        raise _diverged(f"The weights became infinite or NaN ('{bad[0]}')", epoch, steps - 1, lr)

    seconds = time.perf_counter() - start
    images = steps * size
    sums, right = torch.stack(history).cpu().double().mean(0), correct.double()
    added((), [sums, right])
    means = sums.tolist()
    return {
        "loss": sum(means),
        **{f"loss_{name}": mean for name, mean in zip(terms, means, strict=True)},
        "train_accuracy": float(right) / images,
        "lr": lr,
        "seconds": seconds,
        "images_per_s": images / seconds,
    }


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, what `torch.compile` cannot do is said in a sentence."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("torch._"):  # its own exceptions are of several kinds
            raise
        why = str(error).strip().split("\n")[0][:200]
        raise UserError(f"The network cannot be compiled here ({why}). Leave --compile out.") from error


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.SGD:
    """SGD in two groups: weight decay would pull a step size towards zero, that is towards clipping everything.

    A quantizer that wants just that has it in the loss, among its `penalties`.
    """
    scales = quantizer_parameters(model)
    scale_ids = {id(p) for p in scales}
    weights = [p for p in model.parameters() if id(p) not in scale_ids]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def cosine(lr: float, step: int, steps: int) -> float:
    """Cosine annealing from `lr` at step 0 towards zero at `steps`."""
    return 0.5 * lr * (1 + math.cos(math.pi * step / steps))


def _check_finite(history: list[Tensor], epoch: int, lr: float) -> None:
    totals = torch.stack(history).sum(1)
    bad = (~torch.isfinite(totals)).nonzero()
    if len(bad):
        raise _diverged(f"The loss became {float(totals[bad[0, 0]])}", epoch, int(bad[0, 0]), lr)


def _diverged(what: str, epoch: int, step: int, lr: float) -> UserError:
    return UserError(
        f"{what} at epoch {epoch}, step {step}, learning rate {lr:.3g}. Training stopped; the checkpoint of epoch "
        f"{epoch - 1} is the last good one. Try a smaller --lr; at 2 bits also more calibration images, or for FPQ a "
        "lower --csd-weight."
    )


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, split: Split) -> float:
    """Share of `split` that the model gets right, in eval mode; the mode is restored."""
    training = model.training
    model.eval()
    with compiling():
        correct = sum((model(x).argmax(1) == y).sum() for x, y in evaluation_batches(data, split))
    model.train(training)
    return int(correct) / len(split)


def _start(config: TrainConfig, data: Dataset) -> tuple[nn.Module, nn.Module | None, str | None]:
    """The model before training, on the CPU; its teacher and that one's SHA-256 (None for a float run)."""
    if config.init is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return build_model(config.model, data.num_classes, data.channels), None, None
    teacher_run = Run(Path(config.init))
    check_init(config.init)
    epochs = teacher_run.checkpoints
    if not epochs:
        raise UserError(f"'{config.init}' holds no checkpoint to start from. --init wants the folder of one float run.")
    wanted = teacher_run.config["epochs"]
    if max(epochs) < wanted:
        raise UserError(
            f"The teacher '{config.init}' is not finished: epoch {max(epochs)} of {wanted}. Finish it first, with the "
            "command that started it and --resume."
        )
    source = ckpt.read_checkpoint(epochs[max(epochs)])
    if source.quant is not None:
        raise UserError(f"'{config.init}' is a quantized run, and the teacher must be a float one (--method fp).")
    if source.model["name"] != config.model or source.data["classes"] != list(data.classes):
        raise UserError(
            f"'{config.init}' was trained as {source.model['name']} on {source.data['name']} "
            f"({len(source.data['classes'])} classes), and this run is {config.model} on {config.data} "
            f"({data.num_classes} classes). Student and teacher must be the same network on the same classes."
        )
    if source.data["fingerprint"] != data.fingerprint:
        raise UserError(
            f"'{config.init}' was trained on other images than these, though the classes are the same; its training "
            "images may be among your test images. Point --data-root at the data set it was trained on."
        )
    teacher = source.build(config.model)
    spec = config.spec
    assert spec is not None  # TrainConfig sees to it: a run with `init` has bits
    model = quantize(teacher, spec)
    images, _ = training_sample(data, config.calibration_images, config.seed)
    calibrate(model, images.cpu(), spec.act_calibration)
    return model, teacher, source.sha256
