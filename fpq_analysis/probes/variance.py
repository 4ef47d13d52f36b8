"""How much the output changes when the image does: its variance under Gaussian noise (FPQ's Figure 1).

A rising one means that the network turns the same noise in its input into more noise in its output.  For small noise it
is sd^2 times the squared length of the output's gradient with respect to the image; logits scale with a network's
confidence, probabilities do not exceed 1.  With x an image as the network gets it, normalised, and xi standard normal:

- `logit_variance@sd`: variance of the logits at x + sd xi over xi, mean over classes and images.
- `probability_variance@sd`: the same of the probabilities.
- `flipped@sd`: share of the noisy images whose predicted class is not that of x.

The mean over classes rather than the sum, so that data sets of 10 and 100 classes have one scale; the sum is C times
it.  The paper states neither the noise's size, nor the number of draws, nor of what it takes the variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.curvature import as_batches
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction, running, with_forward
from fpq_analysis.intervals import half_interval
from fpq_analysis.measures import VarianceSettings
from fpq_analysis.models import model_device, model_precision
from fpq_analysis.nests import Nest, described, mapped, moved, named_leaves, size, take
from fpq_analysis.probes.point import Point, Rows, stored
from fpq_analysis.probes.result import Measurement
from fpq_analysis.probes.subject import check_finite
from fpq_analysis.progress import Progress
from fpq_analysis.quantizers import view
from fpq_analysis.ranks import gathered, same_on_all_ranks, share

QUANTITIES = ("flipped", "probability_variance", "logit_variance")


@same_on_all_ranks
def output_variance(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    sds: Sequence[float] = VarianceSettings.sds,
    n_draws: int = VarianceSettings.n_draws,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> Measurement:
    """Variance of a classifier's output under Gaussian noise on its input.

    The network is measured as it predicts, really rounding if it is quantized, as a copy in eval mode; the one handed
    over and the global random state are untouched.

    Args:
        model: any `nn.Module` that gives (N, C) logits.
        batches: a pair (inputs, targets), or any iterable of such pairs (docs/data.md); the targets are not looked at.
        sds: standard deviations of the noise, in units of the input as the network gets it (after normalisation).
        n_draws: of noise for each image.  The images share none; the `sds` share all, so that a sweep is smooth.
        seed: of the noise.  Two networks get the same, on any device, and compare in pairs.
        device: where to compute; None for where the model is.
        micro_batch: images to hold at a time; None chooses by the size of one.
        forward: how the model is called, a function (model, inputs) to its outputs; None: as docs/data.md says.

    Returns:
        Rows for each quantity (docs/variance.md) and sd: `sem` is the standard error from the draws for these
        images; `sem_data` that over the images, draws included; `ci95` of the latter; `samples` each image's own value.

    Raises:
        UserError: for settings out of range, a model without logits, or an output that is not finite.
    """
    settings = OutputVariance(tuple(sds), n_draws)
    return Measurement(settings.name, _measure(model, batches, settings, seed, device, micro_batch, forward), seed)


@dataclass(frozen=True)
class OutputVariance(VarianceSettings):
    """The probe: `output_variance` on a checkpoint.

    Attributes: see `output_variance`.

    Raises:
        UserError: for settings that `output_variance` would refuse.
    """

    name = "output_variance"
    version = 1  # part of a record's key: raise it when the numbers change
    needs = ()

    def __call__(self, point: Point) -> Rows:
        """Rows: the quantities by sd; each image's own value in `samples`."""
        return _measure(point.model, point.batches, self, point.seed)


def _measure(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    settings: OutputVariance,
    seed: int,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> Rows:
    where = torch.device(device) if device is not None else model_device(model)
    inputs = [x for x, _ in as_batches(batches, micro_batch)]
    net = view(with_forward(model, forward), "latent", take(inputs[0], slice(2))).to(where)  # the network as it is
    images = [moved(x, where, model_precision(net)) for x in inputs]
    name = _noisy_field(images[0])
    # A seed an image, so that its noise depends on nothing but that.
    seeds = torch.randint(2**31, (sum(map(size, images)),), generator=torch.Generator().manual_seed(seed))
    work: list[tuple[Tensor, ...]] = list(zip(images, seeds.split(list(map(size, images))), strict=True))
    progress = Progress(len(seeds), settings.name, "samples", 1)
    with progress, torch.no_grad(), full_precision():
        work = share(work)
        parts = list(gathered(map_batches(work, lambda batch: _of_images(net, batch[0], batch[1], settings, name))))
    found = torch.cat(parts, 2)  # (sds and quantities, value and error, images)
    names = [(quantity, sd) for sd in settings.sds for quantity in QUANTITIES]
    return [_row(f"{name}@{sd:g}", numbers) for (name, sd), numbers in zip(names, found, strict=True)]


def _of_images(net: nn.Module, x: Nest, seeds: Tensor, settings: OutputVariance, name: str) -> Tensor:
    """(sds x QUANTITIES, 2, B): of every image the quantity and the variance of its error from the draws."""
    image = dict(named_leaves(x))[name][0]
    noise = torch.stack([_noise(image, int(seed), settings.n_draws) for seed in seeds], 1)  # (K, B, ...)
    clean = _logits(net, x)
    found = []
    for sd in settings.sds:
        z = torch.stack([_logits(net, _noisy(x, sd, draw)) for draw in noise])  # (K, B, C)
        flipped = (z.argmax(2) != clean.argmax(1)).double()
        rate = flipped.mean(0)
        found.append(torch.stack([rate, rate * (1 - rate) / (len(z) - 1)]))
        found.append(variance_with_error(z.softmax(2)))
        found.append(variance_with_error(z))
    return torch.stack(found)


def _noisy_field(x: Nest) -> str:
    """Which of the inputs gets the noise: the only one of real numbers."""
    real = [name for name, t in named_leaves(x) if isinstance(t, Tensor) and t.is_floating_point()]
    if len(real) == 1:
        return real[0]
    found = f"has several ({', '.join(real)})" if real else f"takes {described(x)}"
    raise UserError(f"Output variance needs exactly one input of real numbers to add noise to; the network {found}.")


def _noisy(x: Nest, sd: float, draw: Tensor) -> Nest:
    return mapped(lambda t: t + sd * draw.to(t) if t.is_floating_point() else t, x)


def _noise(image: Tensor, seed: int, n_draws: int) -> Tensor:
    """(K, *image.shape), on the CPU."""
    return torch.randn((n_draws, *image.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _logits(net: nn.Module, x: Nest) -> Tensor:
    """(N, C) float64 on the CPU."""
    with running(x):
        z = net(x)
    if not isinstance(z, Tensor) or z.ndim != 2:
        raise UserError("Output variance needs a network that gives one row of logits for each image.")
    return z.cpu().double()


def variance_with_error(z: Tensor) -> Tensor:
    """Unbiased variance over the first axis, mean over the last, and the variance of that estimate.

    The latter is the jackknife's times (K - 2) / (K - 1), which makes it unbiased where z is normal, whatever the
    components' covariance.

    Args:
        z: (K, B, C), K at least 3.

    Returns:
        (2, B).
    """
    k = len(z)
    squares = (z - z.mean(0)).square().mean(2)  # (K, B)
    scatter = (squares - squares.mean(0)).square().sum(0)
    return torch.stack([squares.sum(0) / (k - 1), scatter * k / ((k - 1) ** 2 * (k - 2))])


def _row(quantity: str, numbers: Tensor) -> dict[str, Any]:
    """From (2, N) values and variances of their errors."""
    values, variances = numbers
    n = len(values)
    value = float(values.mean())
    check_finite(value, "output")
    sem_data = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return {
        "layer": "all",
        "quantity": quantity,
        "estimator": "gaussian noise",
        "value": value,
        "sem": math.sqrt(float(variances.sum())) / n,
        "sem_data": sem_data,
        "ci95": half_interval(sem_data, n - 1),
        "n_data": n,
        "samples": stored(values.tolist()),
    }
