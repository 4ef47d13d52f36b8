"""Does FPQ's theory hold here, and up to which noise?  The loss under noise in the features, against Eq. 7.

Noise d_l from U[-size s_l/2, size s_l/2] is added at the input of every convolution l, behind its quantizer of step s_l
(Eq. 9; size 1 is FPQ's own).  Its mean is zero, so to second order (Eq. 7; Pang & Cai 2025, arXiv:2503.11159)

    E L(d) - L(0)  =  1/2 sum_l size^2 s_l^2 / 12 Tr(H_l),      H_l the Hessian of the loss in convolution l's input,

and noise in all layers at once adds up over the layers.  Four numbers are set side by side, each one step closer to the
real network, and where two part one sees why the theory fails:

- `predicted`: the formula.
- `linear`: the loss at z + J d, the logits linear in the noise; what the softmax does beyond the second order.
- `surrogate`: the network with every quantizer straight-through, its rounding residue and clipping fixed as they are
  without noise; what the kinks of ReLU and max-pooling do.  H_l is this network's.
- `real`: the network itself, which rounds anew behind every noisy convolution.  A weak move e flips a share e/s of
  the roundings below it by a whole step s, a variance of e s where the straight-through network has e^2.

In a network that is piecewise linear in its features (the autograd graph proves it) H_l is the Gauss-Newton matrix, and

    Tr(H_l)  =  (1/N) sum_n sum_c || J_nl^T l_nc ||^2

with the C - 1 columns l_nc of the softmax covariance's factor (`curvature/exact.py`): backward passes to all inputs at
once give every layer's trace of every sample without random numbers.  Elsewhere Hutchinson's estimate in feature space.

Noise comes in pairs +d, -d, one draw for all sizes and all four numbers, so that the term linear in d cancels and they
compare in pairs.  Each draw's own second-order term, known from J d, has the prediction as its exact mean, and is taken
off as a control variate, with a coefficient fitted on the other half of the samples: no bias, and far less variance
where the theory holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch
from fpq_analysis.forward import ForwardFunction
from fpq_analysis.intervals import half_interval
from fpq_analysis.linalg.estimate import degrees_of_freedom
from fpq_analysis.losses import LossFunction
from fpq_analysis.measures import NoiseSettings
from fpq_analysis.probes.noise_passes import ALONE, KINDS, OWN, Responses, respond
from fpq_analysis.probes.point import Point, Rows, stored
from fpq_analysis.probes.result import Measurement
from fpq_analysis.probes.subject import Subject, check_finite, prepare
from fpq_analysis.probes.trace import ROOT
from fpq_analysis.ranks import same_on_all_ranks

WITHIN = 0.1
SHOWN = ("predicted_1", "ratio_surrogate_1", "ratio_real_1", "holds_real", "within_10_real", "real_1")
UNIFORM = 1 / 24  # half the variance of U[-1/2, 1/2]


@same_on_all_ranks
def noise_response(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | LossFunction = "cross_entropy",
    sizes: Iterable[float] = NoiseSettings.sizes,
    n_draws: int = NoiseSettings.n_draws,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> Measurement:
    """Loss increase under noise at the input of every convolution, measured and predicted to second order.

    The model is measured as a copy in eval mode; the one handed over, its buffers, gradients and mode, and the global
    random state are untouched.

    Args:
        model: a network quantized by `quantize`, whose convolutions run once in a forward pass.
        batches: a pair (inputs, targets), or any iterable of such pairs (docs/data.md).
        loss: `cross_entropy`, `squared_error`, a `Loss`, or a function (outputs, targets) to the *mean* over the batch.
        sizes: widths of the noise, in steps of each convolution's input; 1, FPQ's own, is always added.
        n_draws: pairs of opposite noise for each sample; noise in one layer alone gets the first two of them.
        seed: of the noise.  A sample's noise depends on it and on the sample's place alone: two models of one
            architecture get the same, and so do all sizes.
        device: where to compute; None for where the model is.
        micro_batch: samples to hold at a time; None chooses by the size of an input.
        forward: how the model is called, a function (model, inputs) to its outputs; None: as docs/data.md says.

    Returns:
        Rows for each layer and quantity, those of the whole model last: `sem` is the standard error from draws, labels
        or probes for these data; `sem_data` that over the data, with these draws in it; `ci95` half of the 95 %
        interval by `sem_data`, with degrees of freedom from the sampled kurtosis, as few samples make up most of an
        increase.  Quantities, with the size behind an underscore:

        - `predicted_1`, `linear_1`, `surrogate_1`, `real_1`: increases of the mean loss, see above; of a layer, by
          noise in it alone.  `linear` is there only where the traces are exact.
        - `ratio_linear_1`, `ratio_surrogate_1`, `ratio_real_1`: the increase relative to the prediction, sample by
          sample, so that its errors are much smaller than theirs.
        - `odd_1`: mean of (L(d) - L(-d)) / 2 of the real network, whose expectation is zero (Eq. 8).
        - `trace`, of a layer: Tr(H_l).
        - `interaction_surrogate`, `interaction_real`: increase by noise in all layers at size 1 less the sum of those
          by noise in each alone; zero to second order (Proposition 1 is about what it is beyond).
        - `holds_surrogate`, `holds_real`: the largest size up to which the prediction lies within the joint 95 %
          interval of all sizes (Bonferroni's), 0 if none; `within_10_surrogate`, `within_10_real`: up to which it is
          less than 10 % off.

    Raises:
        UserError: for a model without quantized inputs of convolutions, settings out of range, data the loss does not
            fit, or a loss that is not finite.
    """
    settings = NoiseResponse(tuple(sizes), n_draws)
    subject = prepare(model, batches, loss=loss, device=device, micro_batch=micro_batch, forward=forward)
    return Measurement(settings.name, _measure(subject, settings, seed), seed, SHOWN)


@dataclass(frozen=True)
class NoiseResponse(NoiseSettings):
    """The probe: `noise_response` on a checkpoint.

    Attributes: see `noise_response`.

    Raises:
        UserError: for settings that `noise_response` would refuse.
    """

    name = "noise"
    version = 3  # part of a record's key: raise it when the numbers change
    needs = ("quantizers",)

    def __call__(self, point: Point) -> Rows:
        """Rows: every layer's, then the whole network's; its increase at size 1 is last."""
        return _measure(prepare(point.model, point.batches, loss=point.loss), self, point.seed)


def _measure(subject: Subject, settings: NoiseResponse, seed: int) -> Rows:
    sizes = sorted({*settings.sizes, OWN})
    found = respond(subject, sizes, settings.n_draws, seed)
    check_finite(float(found.joint["real"].sum()), "loss")
    check_finite(float(found.traces.sum()), "trace")
    return _rows(found, sizes)


# --- From draws to rows ---


def controlled(y: Tensor, control: Tensor) -> Tensor:
    """`y` (K draws, N samples) less a multiple of `control`, whose mean over draws is zero for every sample.

    Each half of the samples takes the multiple of least variance of the other half, so that the mean stays what it was.
    """
    out = y.clone()
    halves = torch.arange(y.shape[1]) % 2 == 0
    for ours in (halves, ~halves):
        there, here = ((t - t.mean(0))[:, ~ours] for t in (y, control))
        power = float(here.square().sum())
        if power > 0:
            out[:, ours] -= float((there * here).sum()) / power * control[:, ours]
    return out


def _mean(draws: Tensor) -> dict[str, Any]:
    """Of (K, N) draws, independent over both: mean, its two errors, and the samples' own means."""
    samples = draws.mean(0)
    k, n = draws.shape
    sem = math.sqrt(float(draws.var(0).mean()) / (k * n)) if k > 1 else 0.0
    sem_data = float(samples.std()) / math.sqrt(n) if n > 1 else math.nan
    return {
        "value": float(samples.mean()),
        "sem": sem,
        "sem_data": sem_data,
        "ci95": math.nan if n < 2 else half_interval(sem_data, degrees_of_freedom(samples)),
    }


def _relative(y: Tensor, predicted: Tensor) -> Tensor:
    """Draws whose mean is the ratio of the two means, and whose errors are those of the ratio, to first order.

    Args:
        y: (K, N); predicted: (draws, N).
    """
    expected = predicted.mean(0)
    ratio = y.mean() / expected.mean()
    return ratio + (y - ratio * expected) / expected.mean()


def _rows(found: Responses, sizes: list[float]) -> Rows:
    method = found.method
    n = found.traces.shape[-1]
    own = sizes.index(OWN)
    weights = found.steps.square() * UNIFORM
    by_layer = found.traces * weights[:, None]  # predictions at size 1, (draws, L, N)
    predicted = by_layer.sum(1)
    # What each draw's second-order term is more than its mean; alone, and last all layers at once.
    controls = None if found.seconds is None else found.seconds - torch.cat([by_layer, predicted[:, None]], 1)

    def steady(y: Tensor, layer: int, size: float) -> Tensor:
        return y if controls is None else controlled(y, size**2 * controls[: len(y), layer])

    joint = {kind: [steady(found.joint[kind][0, i], -1, size) for i, size in enumerate(sizes)] for kind in KINDS}
    alone = {kind: [steady(y, i, OWN) for i, y in enumerate(found.alone[kind])] for kind in KINDS}

    def row(layer: str, quantity: str, draws: Tensor, how: str = "antithetic pairs", **more: Any) -> dict[str, Any]:
        products = 0 if how == "antithetic pairs" else found.n_products
        return {"layer": layer, "quantity": quantity, "estimator": how, "n_products": products, **_mean(draws), **more}

    def ratio(kind: str, size: float, draws: Tensor) -> dict[str, Any]:
        return row("all", _named(f"ratio_{kind}", size), _relative(draws, size**2 * predicted))

    rows: Rows = []
    for i, name in enumerate(found.layers):
        rows.append(row(name or ROOT, "trace", found.traces[:, i], method))
        rows.append(row(name or ROOT, _named("predicted"), by_layer[:, i], method))
        rows += [row(name or ROOT, _named(kind), alone[kind][i]) for kind in KINDS]
    for i, size in enumerate(sizes):
        kept = i == own
        rows.append(row("all", _named("predicted", size), size**2 * predicted, method, **_kept(predicted, kept)))
        if found.linear is not None:
            linear = steady(found.linear[i], -1, size)
            rows += [row("all", _named("linear", size), linear), ratio("linear", size, linear)]
        rows.append(row("all", _named("surrogate", size), joint["surrogate"][i], **_kept(joint["surrogate"][i], kept)))
        rows += [ratio(kind, size, joint[kind][i]) for kind in KINDS]
        rows.append(row("all", _named("odd", size), found.joint["real"][1, i]))
    for kind in KINDS:
        beyond = found.joint[kind][0, own, :ALONE] - found.alone[kind].sum(0)
        if controls is not None:  # the products of two layers' noise, which have mean zero
            beyond = controlled(beyond, controls[:ALONE, -1] - controls[:ALONE, :-1].sum(1))
        rows.append(row("all", f"interaction_{kind}", beyond))
        rows += _verdicts(kind, joint[kind], predicted, sizes)
    # The real increases last, and among them size 1.
    order = [i for i in range(len(sizes)) if i != own] + [own]
    rows += [row("all", _named("real", sizes[i]), joint["real"][i], **_kept(joint["real"][i], i == own)) for i in order]
    return [{"definition": "dequantized", "n_data": n, **row} for row in rows]


def _named(kind: str, size: float = OWN) -> str:
    return f"{kind}_{size:g}"


def _kept(draws: Tensor, kept: bool) -> dict[str, Any]:
    return {"samples": stored(draws.mean(0).tolist())} if kept else {}


def _verdicts(kind: str, joint: list[Tensor], predicted: Tensor, sizes: list[float]) -> Rows:
    """The largest size up to which the prediction holds, by two standards."""
    n = predicted.shape[1]
    holds, within = [], []
    for y, size in zip(joint, sizes, strict=True):
        wanted = size**2 * predicted.mean(0)
        gap = y.mean(0) - wanted
        half = math.nan
        if n > 1:
            half = half_interval(float(gap.std()) / math.sqrt(n), degrees_of_freedom(gap), 1 - 0.05 / len(sizes))
        holds.append(abs(float(gap.mean())) <= half)
        within.append(abs(float(gap.mean())) <= WITHIN * abs(float(wanted.mean())))

    def upto(good: list[bool]) -> float:
        first_bad = good.index(False) if False in good else len(good)
        return sizes[first_bad - 1] if first_bad else 0.0

    return [
        {"layer": "all", "quantity": f"holds_{kind}", "estimator": "joint 95 % interval", "value": upto(holds)},
        {"layer": "all", "quantity": f"within_10_{kind}", "estimator": "point", "value": upto(within)},
    ]
