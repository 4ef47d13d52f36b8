"""The length of the gradient, at the current weights and with noise of the size of rounding (FPQ's Figure 2).

FPQ's argument (Eq. 7 and 8) needs a small gradient: then the loss under a perturbation is ruled by the curvature.  A
rising one means that a step of training, or noise, moves the loss more.  With g_n the gradient of sample n's loss with
respect to the weights (all variables of the definition) and g their mean over the data, three arms:

- `clean`: as the network is.
- `features`: U[-s/2, s/2] in the input of every convolution, behind its quantizer, s its step size (Eq. 9).
- `weights`: U[-s/2, s/2] on the quantized weights of every convolution; the gradient is taken at the noisy weights.

And for each, `@` the arm:

- `grad_norm`: |g|, in total and by layer.
- `grad_norm_minibatch`: the mean of |g_B| over minibatches B, what an optimizer sees.  Its square is about
  |g|^2 + tr Cov(g_n) / |B|, so that it says more about how much samples disagree than about g, once g is small.
- `grad_norm_bias`: how much larger |g| comes out, on average, than it is for the distribution the data are drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis import nests
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.curvature.sampling import layer_of
from fpq_analysis.forward import ForwardFunction
from fpq_analysis.intervals import half_interval
from fpq_analysis.losses import LossFunction
from fpq_analysis.measures import GradNormSettings
from fpq_analysis.probes.noise_arms import ArmNoise, NoNoise, noise_arms
from fpq_analysis.probes.point import Point, Rows, stored
from fpq_analysis.probes.result import Measurement
from fpq_analysis.probes.subject import Subject, check_finite, prepare
from fpq_analysis.probes.trace import ROOT
from fpq_analysis.progress import Progress
from fpq_analysis.ranks import added, gathered, same_on_all_ranks, share

SHOWN = tuple(
    f"{name}@{arm}" for name in ("grad_norm", "grad_norm_minibatch") for arm in ("weights", "features", "clean")
)

# Micro-batches of one minibatch: inputs, targets, and which samples of the data they are.
Minibatch = list[tuple[Tensor, ...]]


@same_on_all_ranks
def gradient_norms(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | LossFunction = "cross_entropy",
    definition: str = "dequantized",
    n_draws: int = GradNormSettings.n_draws,
    batch_size: int = GradNormSettings.batch_size,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> Measurement:
    """Euclidean norm of the gradient of the mean loss with respect to the weights: clean, and in noise.

    The model is measured as a copy in eval mode; the one handed over, its buffers, gradients and mode, and the global
    random state are untouched.  Step sizes are not variables.  The arms in noise are for networks quantized by
    `quantize`, and for the features or weights that are quantized.

    Args:
        model: any `nn.Module`.
        batches: a pair (inputs, targets), or any iterable of such pairs (docs/data.md).
        loss: `cross_entropy`, `squared_error`, a `Loss`, or a function (outputs, targets) to the *mean* over the batch.
        definition: whose gradient: `dequantized` (the weights the network uses), `latent` (the trained ones: clipped
            weights drop out), `float` (quantizers off; clean only).
        n_draws: of noise in the weights, each the same for all samples; in the features, which get noise anew for every
            sample, a quarter of them (two or more), as their error averages out over the samples.
        batch_size: of the minibatches, cut from the data in their order; an incomplete last one is left out.
        seed: of the noise.  Two models of one architecture get the same, on any device, and compare in pairs.
        device: where to compute; None for where the model is.
        micro_batch: samples to hold at a time; None chooses by the size of an input.
        forward: how the model is called, a function (model, inputs) to its outputs; None: as docs/data.md says.

    Returns:
        Rows for each layer, quantity and arm (docs/gradnorm.md), those of the whole model last: `sem` is the
        standard error over the draws for these data (0 without any); `sem_data` the same with that over the data;
        `n_products` counts backward passes over the data.

    Raises:
        UserError: for settings out of range, data the loss does not fit, or a gradient that is not finite.
    """
    settings = GradNorm(definition, n_draws, batch_size)
    subject = prepare(
        model, batches, loss=loss, definition=definition, device=device, micro_batch=micro_batch, forward=forward
    )
    return Measurement(settings.name, _measure(subject, settings, seed), seed, SHOWN)


@dataclass(frozen=True)
class GradNorm(GradNormSettings):
    """The probe: `gradient_norms` on a checkpoint.

    Attributes: see `gradient_norms`.

    Raises:
        UserError: for settings that `gradient_norms` would refuse.
    """

    name = "gradnorm"
    version = 2  # part of a record's key: raise it when the numbers change
    needs = ()

    def __call__(self, point: Point) -> Rows:
        """Rows: the layers' norms, then the model's; the clean norm over all data is last."""
        subject = prepare(point.model, point.batches, loss=point.loss, definition=self.definition)
        return _measure(subject, self, point.seed)


def _measure(subject: Subject, settings: GradNorm, seed: int) -> Rows:
    minibatches = _minibatches(subject.data, settings.batch_size)
    rows: Rows = []
    arms: list[tuple[str, ArmNoise]] = [("clean", NoNoise())]
    if settings.definition != "float":
        arms += noise_arms(subject.model, subject, settings.n_draws, seed)
    passes = sum(noise.n_draws + 1 for _, noise in arms)
    with Progress(passes, settings.name, "passes", subject.n_data):
        for arm, noise in arms:
            rows = [*_of_arm(arm, noise, subject, minibatches, settings), *rows]  # the clean ones end up last
    common = {"definition": settings.definition, "n_data": subject.n_data}
    return [{**row, **common} for row in sorted(rows, key=lambda row: row["layer"] == "all")]


def _minibatches(data: list[Batch], size: int) -> list[Minibatch]:
    """The micro-batches, cut so that each belongs to one minibatch of `size` samples; the last may be smaller."""
    found: list[Minibatch] = []
    room, start = 0, 0
    for x, y in data:
        while nests.size(x):
            if room == 0:
                found.append([])
                room = size
            n = min(room, nests.size(x))
            found[-1].append((*nests.take((x, y), slice(n)), torch.arange(start, start + n)))
            x, y = nests.take((x, y), slice(n, None))
            room, start = room - n, start + n
    return found


# --- Gradients ---


@dataclass(frozen=True)
class _Gradients:
    """The gradients in one draw of the noise.

    Attributes:
        full: the gradient of the mean loss, a tensor a parameter.
        norms: (layers + 1,) its length by layer, and in total last.
        minibatches: (minibatches, layers + 1) the same for whole minibatches.
        spread: trace of the covariance of the samples' gradients, from these; NaN for fewer than two.
    """

    full: list[Tensor]
    norms: Tensor
    minibatches: Tensor
    spread: float


class _Gradient:
    """Gradients of a subject, in the noise of one arm."""

    def __init__(self, subject: Subject, noise: ArmNoise, minibatches: list[Minibatch], batch_size: int) -> None:
        self.subject, self.noise, self.minibatches, self.batch_size = subject, noise, minibatches, batch_size
        self.parameters = list(subject.parameters.values())
        of_layer = list(map(layer_of, subject.parameters))
        self.layers = list(dict.fromkeys(of_layer))
        self.place = torch.tensor([self.layers.index(layer) for layer in of_layer])

    def gradients(self) -> _Gradients:
        """One backward pass over the data."""
        n, size = self.subject.n_data, self.batch_size
        n_whole = n // size
        total = [torch.zeros_like(p) for p in self.parameters]
        found, mean = [], math.nan
        for i, minibatch in enumerate(self.minibatches, 1):
            part = self._sum(minibatch)
            for a, b in zip(total, part, strict=True):
                a += b
            if i <= n_whole:
                found.append(self._norms(part) / size)
            if i == n_whole:
                mean = float(self._norms(total)[-1]) / (n_whole * size)
        full = [t / n for t in total]
        norms = torch.stack(found) if found else torch.empty(0, len(self.layers) + 1, dtype=torch.float64)
        spread = math.nan
        if n_whole > 1:
            spread = size * n_whole / (n_whole - 1) * (float(norms[:, -1].square().mean()) - mean**2)
        return _Gradients(full, self._norms(full), norms, spread)

    def projected(self, full: list[Tensor]) -> Tensor:
        """g_n . g / |g| of every sample, whose mean is |g|: (N,) float64.

        The Jacobian of the samples' losses times a vector: v -> J^T v is linear, and is differentiated once more.
        """
        norm = float(self._norms(full)[-1])
        if norm == 0:
            return torch.zeros(self.subject.n_data, dtype=torch.float64)
        direction = [t / norm for t in full]

        def project(batch: tuple[Tensor, ...]) -> Tensor:
            losses = self._losses(batch)
            dummy = torch.ones_like(losses, requires_grad=True)
            back = torch.autograd.grad(losses, self.parameters, dummy, create_graph=True, allow_unused=True)
            used = [(b, u) for b, u in zip(back, direction, strict=True) if b is not None]
            (found,) = torch.autograd.grad([b for b, _ in used], dummy, [u for _, u in used])
            return found.detach().cpu().double()

        with full_precision(), torch.enable_grad():
            of_all = share([batch for minibatch in self.minibatches for batch in minibatch])
            return torch.cat(list(gathered(map_batches(of_all, project))))

    def _sum(self, minibatch: Minibatch) -> list[Tensor]:
        """The sum of the samples' gradients."""
        sums = [torch.zeros_like(p) for p in self.parameters]
        subject = self.subject

        def add(batch: tuple[Tensor, ...]) -> None:
            x, y, samples = batch
            self.noise.see(samples)
            loss = subject.loss(subject.view(x), y) * nests.size(x)
            for total, g in zip(sums, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
                if g is not None:
                    total += g

        with full_precision(), torch.enable_grad():
            added(map_batches(share(minibatch), add), sums)
        return sums

    def _losses(self, batch: tuple[Tensor, ...]) -> Tensor:
        x, y, samples = batch
        self.noise.see(samples)
        return self.subject.loss.per_sample(self.subject.view(x), y)

    def _norms(self, gradient: list[Tensor]) -> Tensor:
        squares = torch.stack([g.double().square().sum() for g in gradient]).cpu()
        layers = torch.zeros(len(self.layers), dtype=torch.float64).index_add_(0, self.place, squares)
        return torch.cat([layers, squares.sum().unsqueeze(0)]).sqrt()


# --- Rows ---


def _of_arm(
    arm: str, noise: ArmNoise, subject: Subject, minibatches: list[Minibatch], settings: GradNorm
) -> Iterator[dict[str, Any]]:
    gradient = _Gradient(subject, noise, minibatches, settings.batch_size)
    draws: list[_Gradients] = []
    with noise:
        for index in range(noise.n_draws):
            noise.draw(index)
            draws.append(gradient.gradients())
            if index == 0:
                projected = gradient.projected(draws[0].full)
    names = [*(layer or ROOT for layer in gradient.layers), "all"]
    norms = torch.stack([draw.norms for draw in draws])  # (draws, layers)
    smaller = torch.stack([draw.minibatches for draw in draws])  # (draws, minibatches, layers)
    value = float(norms[:, -1].mean())
    check_finite(value, "gradient")
    n = subject.n_data
    variance = float(projected.var()) if n > 1 else math.nan
    spread = sum(draw.spread for draw in draws) / len(draws)

    def row(layer: str, quantity: str, estimator: str, **numbers: Any) -> dict[str, Any]:
        return {
            "layer": layer,
            "quantity": f"{quantity}@{arm}",
            "estimator": estimator,
            "n_products": len(draws),
            **numbers,
        }

    if smaller.shape[1]:
        how = f"minibatches of {settings.batch_size}"
        for place, name in enumerate(names):
            yield row(name, "grad_norm_minibatch", how, **_means(smaller[:, :, place]))
    bias = (spread - variance) / (2 * n * value) if value else math.nan
    if math.isfinite(bias):
        yield row("all", "grad_norm_bias", "second order", value=bias)
    for place, name in enumerate(names[:-1]):
        sem = _error(norms[:, place])
        yield row(name, "grad_norm", "all data", value=float(norms[:, place].mean()), sem=sem, sem_data=math.nan)
    samples = stored(projected.tolist())
    errors = _errors(norms[:, -1], math.sqrt(variance / n), n)
    yield row("all", "grad_norm", "all data", value=value, samples=samples, **errors)


def _means(norms: Tensor) -> dict[str, float]:
    """The mean of (draws, minibatches), which share each other."""
    n = norms.shape[1]
    return {"value": float(norms.mean()), **_errors(norms.mean(1), _error(norms.mean(0)) if n > 1 else math.nan, n)}


def _errors(draws: Tensor, over_data: float, n: int) -> dict[str, float]:
    """Over the draws, and over the n samples or minibatches too: the two variances add.

    What depends on both together is in both, so the sum is rather too large.  Its degrees of freedom are Welch's
    (Satterthwaite 1946).
    """
    sem = _error(draws)
    sem_data = math.hypot(sem, over_data)
    if not sem_data > 0:
        return {"sem": sem, "sem_data": sem_data, "ci95": sem_data}
    dof = sem_data**4 / (over_data**4 / max(1, n - 1) + (sem**4 / (len(draws) - 1) if sem else 0.0))
    return {"sem": sem, "sem_data": sem_data, "ci95": half_interval(sem_data, dof)}


def _error(draws: Tensor) -> float:
    return float(draws.std()) / math.sqrt(len(draws)) if len(draws) > 1 else 0.0
