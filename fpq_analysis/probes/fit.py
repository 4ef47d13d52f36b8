"""How the model does on the sample it is measured on; and, on the way, whether its loss there can have a Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import bdtrc
from torch import Tensor, nn

from fpq_analysis.curvature import repeatable
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.curvature.steps import watch
from fpq_analysis.errors import UnfitError, UserError
from fpq_analysis.forward import running
from fpq_analysis.losses import Loss, check_factor, check_mean
from fpq_analysis.nests import Nest, alike, joined, leaves, size, split, take
from fpq_analysis.ranks import gathered, share

# So many samples are looked at, spread over the data; of a loss that is to be tried out all, to see each batch.
MOST = 4096
# The fewest samples, and the p-value, at which an accuracy is called no better than chance.
FEWEST, UNSURE = 64, 0.05


@dataclass(frozen=True)
class Fit:
    """Means over `n` samples of the data, with standard errors over the distribution they are drawn from.

    Attributes:
        loss, accuracy: means; `accuracy` is NaN where targets are no class numbers.
        chance: accuracy of always naming the class that is the most frequent here; NaN as `accuracy`.
        guess: cross-entropy of always giving the classes' frequencies here; NaN for other losses and targets.
    """

    loss: float
    loss_sem: float
    accuracy: float
    accuracy_sem: float
    chance: float
    guess: float
    n: int

    @property
    def at_chance(self) -> bool:
        """Whether the accuracy is no better than chance, by a one-sided binomial test; False for few samples."""
        if math.isnan(self.accuracy) or self.n < FEWEST or self.chance == 1:
            return False
        return bool(bdtrc(round(self.accuracy * self.n) - 1, self.n, self.chance) > UNSURE)

    @property
    def above_guessing(self) -> bool:
        """Whether the loss is higher, by three standard errors, than that of a guess; False for few samples."""
        return self.n >= FEWEST and self.loss - 3 * self.loss_sem > self.guess


def examine(view: nn.Module, data: list[Batch], loss: Loss) -> Fit:
    """Run the model over the data twice: its loss and accuracy, and whether the loss there can have a Hessian.

    Raises:
        UserError: if the model does not run on them, its outputs are no tensor of one row a sample, not finite, random,
            or so large that their digits are gone; if targets do not fit the loss (`Loss.check`), or it is no mean over
            samples (`check_mean`), or has a curvature of its own making (`check_factor`).
    """
    tail: list[Batch] = []
    shapes: set[torch.Size] = set()

    def look(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, y = batch
        z = _outputs(view, x)
        shapes.add(z.shape[1:])
        _check_digits(loss, z, x)
        if loss.check is not None:
            loss.check(z, y)
            losses = loss.sample_losses(z, y)
        else:
            losses = check_mean(loss, z, y)
            if loss.mean is None:
                losses = loss.sample_losses(z, y)
            if loss.output_factor is not None:
                for few in split((z, y), 8):  # of many samples the few that it is wrong for would not show
                    check_factor(loss, *few)
            ends = [take((z, y), slice(-8, None))]  # batches are as large as they are: some across their borders
            if tail and alike(tail[0], (z, y)):
                check_mean(loss, *joined([tail[0], take((z, y), slice(8))]))
            tail[:] = ends
        if not bool(losses.isfinite().all()):
            raise UserError(f"The loss is not finite on these data{_largest(x, z)}. Check the inputs' normalisation.")
        shares = loss.shares(y)
        found = _hits(loss, z, y)
        named = torch.full((len(z),), found is not None)
        hits, classes = found or (z.new_empty(0), z.new_empty(0))
        return losses.cpu(), torch.ones(len(z)) if shares is None else shares, named, hits.cpu(), classes.cpu()

    every = max(1, math.ceil(sum(map(size, data)) / MOST)) if loss.check is not None else 1
    with torch.no_grad(), full_precision():
        parts = [torch.cat(part) for part in zip(*gathered(map_batches(share(data[::every]), look)), strict=True)]
    if loss.check is not None and every > 1 and len(shapes) == 1:  # the targets of the batches that were passed over
        for x, y in data:
            loss.check(torch.empty((size(x), *next(iter(shapes))), device="meta"), y)
    losses, shares, named, hits, classes = (part.double() for part in parts)
    n, mean = len(losses), float(losses.sum() / shares.sum())
    error = float((losses - mean * shares).std()) / math.sqrt(n) if n > 1 else math.nan
    if not bool(named.all()) or not len(hits):
        return Fit(mean, error, math.nan, math.nan, math.nan, math.nan, n)
    accuracy = float(hits.mean())
    frequencies = classes.long().bincount() / len(classes)
    # Of probabilities as targets, the most probable classes are not what the best guess goes by.
    plain = loss.name == "cross_entropy" and not any(y.is_floating_point() for y in leaves(data[0][1]))
    guess = float(torch.special.entr(frequencies).sum()) if plain else math.nan
    return Fit(mean, error, accuracy, math.sqrt(accuracy * (1 - accuracy) / n), float(frequencies.max()), guess, n)


def _outputs(view: nn.Module, x: Nest) -> Tensor:
    with running(x):
        z = repeatable(view, x)
    if z.shape[:1] != (size(x),):
        raise UserError(
            f"The model gives an output of shape {tuple(z.shape)} for {size(x)} inputs; it must give a row for each."
        )
    if not bool(z.isfinite().all()):
        steps = watch(view, lambda: view(x))[1]
        bad = next((step.label for step in steps if not bool(step.value.isfinite().all())), "")
        where = f"; {bad} is the first module whose output is not" if bad else ""
        cause = "the inputs hold NaN or infinity" if not all(bool(t.isfinite().all()) for t in leaves(x)) else where
        raise UserError(
            f"The model's output is not finite on these data: {cause.removeprefix('; ') or 'it overflowed'}. Check the "
            "inputs and their normalisation, and the weights; or measure in float64 (model.double(), inputs.double())."
        )
    return z


def _check_digits(loss: Loss, z: Tensor, x: Nest) -> None:
    largest = float(z.abs().max())
    if loss.resolution and largest * torch.finfo(z.dtype).eps > loss.resolution:
        kind = str(z.dtype).removeprefix("torch.")
        raise UnfitError(
            f"The outputs reach {largest:.1e}, where {kind} has no digits left for differences of {loss.resolution:g}, "
            f"of which the loss '{loss.name}' is made{_largest(x, None)}.",
            "Check the inputs' normalisation.",
        )


def _largest(x: Nest, z: Tensor | None) -> str:
    real = [float(t.abs().max()) for t in leaves(x) if t.is_floating_point()]
    inputs = f"; the largest input is {max(real):.1e}" if real else ""
    return inputs + (f", the largest output {float(z.abs().max()):.1e}" if z is not None else "")


def _hits(loss: Loss, z: Tensor, y: Nest) -> tuple[Tensor, Tensor] | None:
    """For each target that is a class whether it has the largest output, and the class; None where they are none."""
    if loss.classes is not None:
        z, y = loss.classes(z, y)
    else:
        fits = isinstance(y, Tensor) and z.ndim > 1 and z.shape[1] > 1 and y.shape == z.shape[:1] + z.shape[2:]
        if not fits or y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= z.shape[1]:
            return None
    counts = y >= 0
    return (z.argmax(1) == y)[counts].float(), y[counts]
