"""Sharpness that survives rescaling: how much the loss rises when the weights are moved in units of their own.

A ReLU network computes the same when one layer is scaled by a and the next by 1/a, and so does one with BatchNorm when
a convolution and its statistics are scaled; the trace of the Hessian does not stay the same.  These measures do, but
for `sam_one_step`; scaling single channels leaves only `sam_adaptive` and, in front of BatchNorm, those in steps the
same.  A rising one means that the same *relative* move, or the same part of a quantization step, costs more loss.  With
p a parameter tensor of n_p entries, Tr_p its block's trace, g the gradient of L, xi standard normal:

- `scaled_trace`: sum_p |p|^2 Tr_p.
- `sam_one_step`: L(w + rho g / |g|) - L(w) (SAM, Foret et al. 2021, arXiv:2010.01412); the one that is not invariant.
- `sam_adaptive`: L(w + rho' T^2 g / |T g|) - L(w), T = |w| entry by entry (ASAM, Kwon et al. 2021, arXiv:2102.11600).
- `average_case`: E L(w + sigma |p| xi / sqrt(n_p)) - L(w), every p at once; sigma^2/2 sum_p |p|^2 Tr_p / n_p for small
  sigma.  The field's average-case sharpness (Andriushchenko et al. 2023, arXiv:2302.07011) scales entry by entry.

And for weights on a grid (k - z) s, k = 0 .. 2^bits - 1, in units of the step s:

- `half_step_mean`: mean change when every quantized weight moves by a uniform random number of -s/2 .. s/2.
- `half_step_worst`: change when each moves by s/2 in the sign of its gradient; also for each layer alone.  One step,
  so a lower bound of the worst; where the gradient says little, even the mean is larger.
- `bit_flip_mean`: mean change when one random bit of one random quantized weight's code k flips.
- `bit_flip_worst`: the largest of the flips with the largest |g times move|.  A lower bound: others are not tried.

Departures from ASAM: biases and BatchNorm's parameters are scaled like weights, and nothing (their eta) is added to T;
otherwise the measure would not be invariant.  See docs/sharpness.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fpq_analysis.choices import N_LABELS, N_PRODUCTS, check_definition
from fpq_analysis.curvature import NotExactError, certify, per_sample_traces
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.exact import exact_passes
from fpq_analysis.curvature.memory import freed_memory_kept, map_batches
from fpq_analysis.curvature.operator import CurvatureOperator
from fpq_analysis.curvature.sampling import ALL, collected, layer_blocks, layer_of, shares_of
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction
from fpq_analysis.linalg import Lanczos, deflated_hutchinson
from fpq_analysis.losses import LossFunction
from fpq_analysis.nests import size
from fpq_analysis.probes.grid_codes import Flip, Grid, likely_worst_flips, random_flips
from fpq_analysis.probes.point import Point, Rows, stored
from fpq_analysis.probes.result import Measurement
from fpq_analysis.probes.sample_traces import exact_or_sampled
from fpq_analysis.probes.subject import Subject, check_finite, prepare
from fpq_analysis.probes.trace import ROOT
from fpq_analysis.progress import Progress
from fpq_analysis.quantizers import Quantizer, quantizers
from fpq_analysis.ranks import added, gathered, same_on_all_ranks, share

RHO = 0.05  # usual for CIFAR-10
RHO_ADAPTIVE = 0.5  # ten times as much, as is usual
SIGMA = 0.1  # about the relative error of rounding a normal weight to 4 bits
N_DRAWS = 16
N_FLIPS = 64
CANDIDATES = 16  # flips measured for the worst one

# By parameter name, new values or moves of the parameter's shape.
Weights = dict[str, Tensor]


@same_on_all_ranks
def sharpness(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | LossFunction = "cross_entropy",
    definition: str = "dequantized",
    rho: float = RHO,
    rho_adaptive: float = RHO_ADAPTIVE,
    sigma: float = SIGMA,
    n_draws: int = N_DRAWS,
    n_flips: int = N_FLIPS,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> Measurement:
    """Measures of sharpness that do not change when layers are rescaled, and some in units of the quantization step.

    Loss changes are measured, never linearised, on a copy in eval mode with plain weights; quantized activations are
    really rounded.  The model handed over, its buffers, gradients and mode, and the global random state are untouched.

    Args:
        model: any `nn.Module`; the quantities in steps are for those quantized by `quantize`.
        batches: a pair (inputs, targets), or any iterable of such pairs (docs/data.md).
        loss: `cross_entropy`, `squared_error`, a `Loss`, or a function (outputs, targets) to the *mean* over the batch.
        definition: `dequantized` moves the weights the network uses; `float` the trained ones, quantizers off.
        rho, rho_adaptive: length of SAM's step; of ASAM's, relative to each weight.
        sigma: length of the average-case move of a parameter tensor, relative to the tensor's.
        n_draws: pairs of opposite moves for each mean.
        n_flips: random bits flipped for their mean, one at a time.
        seed: of moves, flips and labels.  Two models of one architecture get the same, and compare in pairs.
        device, micro_batch, forward: as for `hessian_trace`.

    Returns:
        Rows for each layer and quantity, those of the whole model last: `sem` is the standard error from draws, labels
        or probes for these data (0 without any); `sem_data` the same with that over the data (NaN where a direction
        was chosen on these data, or samples are not seen one by one); `n_products` counts backward passes or
        Hessian-vector products.

    Raises:
        UserError: for settings out of range, data the loss does not fit, or a loss that is not finite.
    """
    settings = Sharpness(definition, rho, rho_adaptive, sigma, n_draws, n_flips)
    subject = prepare(
        model, batches, loss=loss, definition=definition, device=device, micro_batch=micro_batch, forward=forward
    )
    return Measurement(settings.name, _measure(subject, settings, seed), seed)


@dataclass(frozen=True)
class Sharpness:
    """The probe: `sharpness` on a checkpoint.

    Attributes: see `sharpness`.

    Raises:
        UserError: for settings that `sharpness` would refuse.
    """

    definition: str = "dequantized"
    rho: float = RHO
    rho_adaptive: float = RHO_ADAPTIVE
    sigma: float = SIGMA
    n_draws: int = N_DRAWS
    n_flips: int = N_FLIPS

    name = "sharpness"
    version = 2  # part of a record's key: raise it when the numbers change
    needs = ()

    def __post_init__(self) -> None:
        check_definition(self.definition)
        if self.definition == "latent":
            raise UserError(
                "Sharpness moves weights and measures the loss, and a latent weight moved within its rounding step "
                "changes nothing. Use the definition 'dequantized' (the weights the network uses), or 'float'."
            )
        for what in ("rho", "rho_adaptive", "sigma"):
            if not 0 < getattr(self, what) < math.inf:
                raise UserError(f"{what} is {getattr(self, what)}, and must be a number above zero.")
        if min(self.n_draws, self.n_flips) < 2:
            raise UserError("An error needs at least 2 draws (n_draws) and 2 flips (n_flips).")

    def __call__(self, point: Point) -> Rows:
        """Rows: the layers' quantities, then the model's; its scaled trace is last."""
        subject = prepare(point.model, point.batches, loss=point.loss, definition=self.definition)
        return _measure(subject, self, point.seed)


def _measure(subject: Subject, settings: Sharpness, seed: int) -> Rows:
    with Progress(None, settings.name, "passes", subject.n_data):
        losses = _Losses(subject)
        gradient = losses.gradient()
        layers, total = _scaled_traces(subject, seed)
        rows = [*_one_step(losses, gradient, settings), _average_case(losses, settings, seed)]
        grids = {
            name: Grid.of(losses.weights[name], quantizer)
            for name, quantizer in _weight_quantizers(subject.model).items()
            if name in losses.weights and settings.definition == "dequantized"
        }
        if grids:
            rows = [*_half_steps(losses, gradient, grids, settings, seed), *rows]
            rows += _bit_flips(losses, gradient, grids, settings, seed)
    common = {"definition": settings.definition, "n_data": subject.n_data}
    return [{**row, **common} for row in (*layers, *rows, total)]


class _Losses:
    """The loss of every sample, where the weights are and when they are moved; the view itself is never written to."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.batches: list[tuple[Tensor, ...]] = share(subject.data)  # `map_batches` halves these
        self.weights = {name: p.detach() for name, p in subject.parameters.items()}
        self.here = self._at({})
        check_finite(float(self.here.mean()), "loss")

    def change(self, values: Weights) -> Tensor:
        """Each sample's change of loss when these parameters take these values: (N,) float64 on the CPU."""
        return self._at(values) - self.here

    def moved(self, moves: Weights) -> Tensor:
        """The same when these parameters are moved by so much."""
        return self.change({name: self.weights[name] + move for name, move in moves.items()})

    def gradient(self) -> Weights:
        """The gradient of the mean loss; zeros for a parameter the loss does not use."""
        subject = self.subject
        sums = {name: torch.zeros_like(w) for name, w in self.weights.items()}

        def add(batch: tuple[Tensor, ...]) -> None:
            x, y = batch
            loss = subject.loss(subject.view(x), y) * (size(x) / subject.n_data)
            found = torch.autograd.grad(loss, list(subject.parameters.values()), allow_unused=True)
            for total, part in zip(sums.values(), found, strict=True):
                if part is not None:
                    total += part

        with full_precision(), freed_memory_kept(), torch.enable_grad():
            added(map_batches(self.batches, add), sums.values())
        return sums

    @torch.no_grad()
    def _at(self, values: Weights) -> Tensor:
        view = self.subject.view
        with full_precision(), freed_memory_kept():
            parts = map_batches(
                self.batches,
                lambda batch: self.subject.sample_losses(functional_call(view, values, (batch[0],)), batch[1]),
            )
            return torch.cat(list(gathered(parts)))


def _row(layer: str, quantity: str, estimator: str, n_products: int, **numbers: Any) -> dict[str, Any]:
    return {"layer": layer, "quantity": quantity, "estimator": estimator, "n_products": n_products, **numbers}


def _single(layer: str, quantity: str, estimator: str, change: Tensor) -> dict[str, Any]:
    """A row from one move, chosen by the gradient on these very data, whose error over the data is thus not known."""
    return _row(layer, quantity, estimator, 1, value=float(change.mean()), sem=0.0, sem_data=math.nan)


def _mean(quantity: str, estimator: str, changes: Tensor) -> dict[str, Any]:
    """A row from (draws, N) changes, the draws shared by all samples.

    The two variances add: what depends on draw and sample together is in both, so the error is rather too large.
    """
    samples, draws = changes.mean(0), changes.mean(1)
    sem = float(draws.std()) / math.sqrt(len(draws))
    sem_data = math.hypot(sem, _error_over(samples))
    return _row("all", quantity, estimator, 0, value=float(draws.mean()), sem=sem, sem_data=sem_data, **_kept(samples))


def _error_over(samples: Tensor) -> float:
    return float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan


def _kept(samples: Tensor) -> dict[str, list[float]]:
    return {"samples": stored(samples.tolist())}


# --- The trace ---


def _scaled_traces(subject: Subject, seed: int) -> tuple[Rows, dict[str, Any]]:
    """`scaled_trace` of every layer, and of the model."""
    norms = {name: float(p.detach().cpu().double().norm()) for name, p in subject.parameters.items()}
    try:
        rows, total = _by_sample(subject, norms, seed)
    except NotExactError:
        rows, total = _by_product(subject, norms, seed)
    check_finite(total["value"], "trace")
    return rows, total


def _by_sample(subject: Subject, norms: dict[str, float], seed: int) -> tuple[Rows, dict[str, Any]]:
    method, _ = exact_or_sampled(subject, None)
    n_labels = N_LABELS if method == "sampled" else None
    certify(subject.view, subject.data, subject.parameters)
    of = (subject.view, subject.loss, subject.data, subject.parameters)
    passes = n_labels or exact_passes(*of[:2], subject.data[0])
    parts = per_sample_traces(*of, n_labels=n_labels, generator=torch.Generator().manual_seed(seed))
    scaled = ({name: draws * norms[name] ** 2 for name, draws in part.items()} for part in parts)
    found = collected(scaled, passes, shares_of(subject.loss, subject.data))

    def row(name: str, layer: str) -> dict[str, Any]:
        numbers = {"value": found.value(layer), "sem": found.sem(layer), "sem_data": found.sem_data(layer)}
        return _row(name, "scaled_trace", method, found.n_passes, **numbers)

    layers = [row(layer or ROOT, layer) for layer in found.traces if layer != ALL]
    return layers, {**row("all", ALL), **_kept(found.traces[ALL])}


def _by_product(subject: Subject, norms: dict[str, float], seed: int) -> tuple[Rows, dict[str, Any]]:
    matrix = _Scaled(subject.operator(), norms)
    blocks = layer_blocks(matrix.slices)
    generator = torch.Generator().manual_seed(seed)
    krylov = Lanczos(matrix, generator=generator)
    found = deflated_hutchinson(matrix, list(blocks.values()), krylov, generator=generator, n_products=N_PRODUCTS)

    def row(layer: str, value: float, sem: float) -> dict[str, Any]:
        return _row(layer, "scaled_trace", "deflated", found.n_products, value=value, sem=sem, sem_data=math.nan)

    numbers = zip(blocks, found.blocks.tolist(), found.block_sems.tolist(), strict=True)
    return [row(layer or ROOT, value, sem) for layer, value, sem in numbers], row("all", found.value, found.sem)


class _Scaled:
    """D H D, whose trace is sum_p |p|^2 Tr_p: D is |p| at every entry of the parameter p."""

    def __init__(self, hessian: CurvatureOperator, norms: dict[str, float]) -> None:
        self.hessian = hessian
        self.size, self.dtype, self.device = hessian.size, hessian.dtype, hessian.device
        self.slices = hessian.slices
        self.scale = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for name, place in self.slices.items():
            self.scale[place] = norms[name]

    def products(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """D H D v for every row v of (k, size)."""
        return self.hessian.products(self.scale * v, out).mul_(self.scale)


# --- Moves of every parameter, relative to itself ---


def _one_step(losses: _Losses, gradient: Weights, settings: Sharpness) -> Rows:
    ones = {name: torch.ones_like(w) for name, w in losses.weights.items()}
    sizes = {name: w.abs() for name, w in losses.weights.items()}
    steps = {
        "sam_one_step": ascent(gradient, ones, settings.rho),
        "sam_adaptive": ascent(gradient, sizes, settings.rho_adaptive),
    }
    return [_single("all", quantity, "gradient step", losses.moved(step)) for quantity, step in steps.items()]


def ascent(gradient: Weights, scales: Weights, rho: float) -> Weights:
    """The step rho T^2 g / |T g|: of all of length rho in T^-1 w, the one the linearised loss rises most along.

    Args:
        scales: T > 0, entry by entry.
    """
    scaled = {name: scales[name] * g for name, g in gradient.items()}
    norm = math.sqrt(sum(float(t.cpu().double().square().sum()) for t in scaled.values()))
    return {name: t * scales[name] * (rho / norm if norm else 0.0) for name, t in scaled.items()}


def _average_case(losses: _Losses, settings: Sharpness, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Weights:
        return {
            name: _normal(w, generator) * (settings.sigma * w.norm() / math.sqrt(w.numel()))
            for name, w in losses.weights.items()
        }

    return _mean("average_case", "antithetic pairs", _pairs(losses, draw, settings.n_draws))


def _pairs(losses: _Losses, draw: Callable[[], Weights], n: int) -> Tensor:
    """(n, N) means of the changes by a random move and by its opposite: the linear part of the loss cancels."""
    moves = (draw() for _ in range(n))
    return torch.stack(
        [(losses.moved(move) + losses.moved({name: -m for name, m in move.items()})) / 2 for move in moves]
    )


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


# --- Moves in units of the quantization step ---


def _weight_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """By the weight's plain name."""
    return {f"{layer}.weight".lstrip("."): q for layer, q, is_weight in quantizers(model) if is_weight}


def _half_steps(losses: _Losses, gradient: Weights, grids: dict[str, Grid], settings: Sharpness, seed: int) -> Rows:
    worst = {name: grid.step / 2 * gradient[name].sign() for name, grid in grids.items()}
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Weights:
        return {name: grid.step * _uniform(losses.weights[name], generator) for name, grid in grids.items()}

    how = "gradient sign"
    return [
        *(_single(layer_of(k) or ROOT, "half_step_worst", how, losses.moved({k: m})) for k, m in worst.items()),
        _mean("half_step_mean", "antithetic pairs", _pairs(losses, draw, settings.n_draws)),
        _single("all", "half_step_worst", how, losses.moved(worst)),
    ]


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """From -1/2 to 1/2."""
    return (torch.rand(like.shape, generator=generator, dtype=like.dtype) - 0.5).to(like.device)


def _bit_flips(losses: _Losses, gradient: Weights, grids: dict[str, Grid], settings: Sharpness, seed: int) -> Rows:
    def changes(flips: list[Flip]) -> Tensor:
        return torch.stack([losses.change({name: grids[name].flipped(place, bit)}) for name, place, bit in flips])

    flips, weights = random_flips(grids, settings.n_flips, seed)
    worst = changes(likely_worst_flips(grids, gradient, CANDIDATES))
    return [
        _mean("bit_flip_mean", "weighted flips", changes(flips) * weights.unsqueeze(1)),
        _single("all", "bit_flip_worst", f"top {len(worst)} by gradient", worst[worst.mean(1).argmax()]),
    ]
