"""Does FPQ's theory hold here, and up to which noise?  The loss under noise in the features, against Eq. 7.

Noise d_l from U[-size s_l/2, size s_l/2] is added at the input of every convolution l, behind its quantizer of step s_l
(Eq. 9; size 1 is FPQ's own).  Its mean is zero, so to second order (Eq. 7; Pang & Cai 2025, arXiv:2503.11159)

    E L(d) - L(0)  =  1/2 sum_l size^2 s_l^2 / 12 Tr(H_l),      H_l the Hessian of the loss in convolution l's input,

and noise in all layers at once adds up over the layers.  Four numbers are set side by side, each one step closer to the
real network, and where two part one sees why the theory fails:

- `predicted`: the formula.
- `linear`: the loss at z + J d, the logits linear in the noise; what the softmax does beyond the second order.
- `surrogate`: the network with every quantizer straight-through, its rounding residue and its clipping held as they are
  without noise; what the kinks of ReLU and max-pooling do.  H_l is this network's.
- `real`: the network itself, which rounds anew behind every noisy convolution.  A weak move e flips a share e/s of
  the roundings below it by a whole step s, a variance of e s where the straight-through network has e^2.

In a network that is piecewise linear in its features (a numeric check decides) H_l is the Gauss-Newton matrix, and

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fpq_analysis.curvature import NotExactError
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.certificate import FEWEST, TURNS, spread
from fpq_analysis.curvature.exact import cross_entropy_factor, exact_passes, label_uniforms, sampled_factor
from fpq_analysis.curvature.memory import each
from fpq_analysis.curvature.operator import Loss
from fpq_analysis.errors import UserError
from fpq_analysis.linalg.estimate import degrees_of_freedom
from fpq_analysis.probes.point import Point, Rows, stored
from fpq_analysis.probes.subject import Subject, check_finite, prepare
from fpq_analysis.probes.trace import N_LABELS, ROOT, exact_or_sampled, half_interval
from fpq_analysis.quantizers import FeatureNoise, Quantizer, quantizers

SIZES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
OWN = 1.0  # the size of FPQ's noise; layers alone are measured at it
# Most of the increase is that of a few images.  From two draws of each (ResNet-20 on digits, 512 images) the error of
# the whole came out between half of what it was and twice as much; from eight, within a factor of one and a half.
N_DRAWS = 8
ALONE = 2  # of these draws, for noise in one layer
N_PROBES = 32
WITHIN = 0.1
UNIFORM = 1 / 24  # half the variance of U[-1/2, 1/2]
KINDS = ("surrogate", "real")

# By layer, a tensor (B, *features) at its input.
Features = dict[str, Tensor]


def noise_response(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | Loss = "cross_entropy",
    sizes: Iterable[float] = SIZES,
    n_draws: int = N_DRAWS,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
) -> pd.DataFrame:
    """Loss increase under noise at the input of every convolution, measured and predicted to second order.

    The model is measured as a copy in eval mode; the one handed over, its buffers, gradients and mode, and the global
    random state are untouched.

    Args:
        model: a network quantized by `quantize`, whose convolutions run once in a forward pass.
        batches: a pair (inputs, targets) of tensors, or any iterable of such pairs.
        loss: `cross_entropy`, or a function (outputs, targets) to the *mean* over the batch.
        sizes: widths of the noise, in steps of each convolution's input; 1, FPQ's own, is always added.
        n_draws: pairs of opposite noise for each sample; noise in one layer alone gets the first two of them.
        seed: of the noise.  A sample's noise depends on it and on the sample's place alone: two models of one
            architecture get the same, and so do all sizes.
        device: where to compute; None for where the model is.
        micro_batch: samples to hold at a time; None chooses by the size of an input.

    Returns:
        A row for each layer and quantity, those of the whole model (layer `all`) last: definition, estimator, layer,
        quantity, value; sem, the standard error from draws, labels or probes for these data; sem_data, that over the
        data, with these draws in it; ci95, half of the 95 % interval by sem_data, with degrees of freedom from the
        sampled kurtosis, as few samples make up most of an increase; n_data, n_products.  Quantities, with the size
        behind an underscore:

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
    subject = prepare(model, batches, loss=loss, device=device, micro_batch=micro_batch)
    return pd.DataFrame(_measure(subject, settings, seed)).drop(columns="samples")


@dataclass(frozen=True)
class NoiseResponse:
    """The probe: `noise_response` on a checkpoint.

    Attributes: see `noise_response`.

    Raises:
        UserError: for settings that `noise_response` would refuse.
    """

    sizes: tuple[float, ...] = SIZES
    n_draws: int = N_DRAWS

    name = "noise"
    version = 1  # part of a record's key: raise it when the numbers change
    needs = ("quantizers",)

    def __post_init__(self) -> None:
        if not all(0 < size < math.inf for size in self.sizes):
            raise UserError(f"Sizes of noise are numbers above zero, in steps; got {', '.join(map(str, self.sizes))}.")
        if self.n_draws < 2:
            raise UserError("An error needs at least 2 draws a sample (n_draws).")

    def __call__(self, point: Point) -> Rows:
        """Rows: every layer's, then the whole network's; its increase at size 1 is last."""
        return _measure(prepare(point.model, point.batches, loss=point.loss), self, point.seed)


@dataclass(frozen=True)
class _Found:
    """What all samples gave; L layers, S sizes, K draws, N samples, float64 on the CPU.

    Attributes:
        layers: names; steps: their s_l.
        traces: (draws, L, N) estimates of Tr(H_l) of each sample's loss; one draw if exact.
        seconds: (K, L + 1, N) each draw's second-order term at size 1, by noise in one layer and, last, in all; None
            if the traces are not exact.
        linear: (S, K, N) even parts of the change of loss at z + J d, or None.
        joint: by kind, (2, S, K, N) even and odd parts, noise in all layers.
        alone: by kind, (L, ALONE, N) even parts at size 1, noise in one layer.
    """

    layers: list[str]
    steps: Tensor
    traces: Tensor
    seconds: Tensor | None
    linear: Tensor | None
    joint: dict[str, Tensor]
    alone: dict[str, Tensor]


def _measure(subject: Subject, settings: NoiseResponse, seed: int) -> Rows:
    sizes = sorted({*settings.sizes, OWN})
    sites = _sites(subject.view)
    subject.view.requires_grad_(False)  # a copy of our own; backward passes then reach features only
    method, passes = _choose(subject, sites)
    work = _Measurement(subject, sites, sizes, method, settings.n_draws, seed)
    found = work.run()
    check_finite(float(found.joint["real"].sum()), "loss")
    check_finite(float(found.traces.sum()), "trace")
    return _rows(found, sizes, method, passes)


def _sites(view: nn.Module) -> dict[str, tuple[nn.Module, Quantizer]]:
    """The convolutions that get noise, with their inputs' quantizers, by name."""
    names = {module: name for name, module in view.named_modules()}
    places = FeatureNoise(view, torch.Generator()).sites
    if not places:
        raise UserError(
            "No convolution of the model has a quantized input, and noise is measured in its steps. Quantize the "
            "inputs: quantize(model, QuantSpec.parse('W4A4'))."
        )
    return {names[layer]: (layer, quantizer) for layer, quantizer in places}


# --- The network with noise ---


@contextmanager
def _added(sites: dict[str, tuple[nn.Module, Quantizer]], moves: Features, size: float = 1.0) -> Iterator[None]:
    """Inside, size times the move is added to what these layers' quantizers give."""

    def adder(move: Tensor) -> Any:
        return lambda layer, args: (args[0] + size * move, *args[1:])

    handles = [sites[name][0].register_forward_pre_hook(adder(move)) for name, move in moves.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Clean:
    """What is needed to know of the pass without noise: shapes of the features, and each quantizer's straight line.

    The straight-through derivative q'(x0) is one in range and zero where clipped, so q(x0) + q'(x0) (x - x0) keeps
    the rounding residue in range, and the clipped value outside.
    """

    def __init__(self, view: nn.Module, sites: dict[str, tuple[nn.Module, Quantizer]], x: Tensor) -> None:
        self.inputs = [quantizer for _, quantizer, is_weight in quantizers(view) if not is_weight]
        self.shapes: dict[str, torch.Size] = {}
        self.lines: dict[Quantizer, tuple[Tensor, Tensor]] = {}
        names = {layer: name for name, (layer, _) in sites.items()}

        def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if names[layer] in self.shapes:
                raise UserError(
                    f"The layer '{names[layer]}' runs more than once in a forward pass, and noise is measured for "
                    "layers that run once. Give each call a layer of its own."
                )
            self.shapes[names[layer]] = args[0].shape[1:]

        def fit(quantizer: Quantizer, args: tuple[Any, ...], output: Tensor) -> None:
            before = args[0].detach().requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(quantizer.forward(before).sum(), before)
            self.lines[quantizer] = slope, output - slope * before.detach()

        handles = [layer.register_forward_pre_hook(look) for layer in names]
        handles += [quantizer.register_forward_hook(fit) for quantizer in self.inputs]
        try:
            with torch.no_grad():
                self.outputs = view(x)
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, every quantizer of an input is its straight line."""

        def replace(quantizer: Quantizer, args: tuple[Any, ...], output: Tensor) -> Tensor:
            slope, offset = self.lines[quantizer]
            return slope * args[0] + offset

        handles = [quantizer.register_forward_hook(replace) for quantizer in self.inputs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Measurement:
    """Micro-batch by micro-batch: derivatives in feature space, and losses under noise."""

    def __init__(
        self,
        subject: Subject,
        sites: dict[str, tuple[nn.Module, Quantizer]],
        sizes: list[float],
        method: str,
        n_draws: int,
        seed: int,
    ) -> None:
        self.subject, self.sites, self.sizes, self.method = subject, sites, sizes, method
        self.n_draws = n_draws
        generator = torch.Generator().manual_seed(seed)
        self.seeds = torch.randint(2**31, (subject.n_data, n_draws + N_PROBES), generator=generator)
        self.labels = label_uniforms(torch.empty(subject.n_data), N_LABELS, generator)

    def run(self) -> _Found:
        """Measure all samples."""
        places = torch.arange(self.subject.n_data).split([len(x) for x, _ in self.subject.data])
        batches = [(x, y, place) for (x, y), place in zip(self.subject.data, places, strict=True)]
        with full_precision():
            parts = list(each(batches, self._batch))  # type: ignore[arg-type]
        joined = {key: torch.cat([part[key] for part in parts], -1) for key in parts[0]}
        steps = torch.stack([quantizer.step_size.detach().cpu().double() for _, quantizer in self.sites.values()])
        return _Found(
            list(self.sites),
            steps,
            joined["traces"],
            joined.get("seconds"),
            joined.get("linear"),
            {kind: joined[f"joint {kind}"] for kind in KINDS},
            {kind: joined[f"alone {kind}"] for kind in KINDS},
        )

    def _batch(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, y, places = batch
        view = self.subject.view
        clean = _Clean(view, self.sites, x)
        noise = [self._noise(clean, places, k, x) for k in range(self.n_draws)]
        found = self._derivatives(clean, x, y, places, noise)
        with torch.no_grad():
            found |= self._losses("real", x, y, noise)
            with clean.held():
                found |= self._losses("surrogate", x, y, noise)
        return found

    def _losses(self, kind: str, x: Tensor, y: Tensor, noise: list[Features]) -> dict[str, Tensor]:
        here = self.subject.sample_losses(self.subject.view(x), y)

        def change(moves: Features, size: float) -> Tensor:
            """(2, B): even and odd part."""
            losses = []
            for signed in (size, -size):
                with _added(self.sites, moves, signed):
                    losses.append(self.subject.sample_losses(self.subject.view(x), y))
            return torch.stack([(losses[0] + losses[1]) / 2 - here, (losses[0] - losses[1]) / 2])

        joint = [torch.stack([change(moves, size) for moves in noise], 1) for size in self.sizes]
        few = noise[:ALONE]
        alone = [torch.stack([change({name: moves[name]}, OWN)[0] for moves in few]) for name in self.sites]
        return {f"joint {kind}": torch.stack(joint, 1), f"alone {kind}": torch.stack(alone)}

    def _noise(self, clean: _Clean, places: Tensor, draw: int, x: Tensor) -> Features:
        """Noise of size 1 for every site."""
        steps = {name: quantizer.step_size.detach() for name, (_, quantizer) in self.sites.items()}
        uniform = self._by_site(clean, places, draw, x)
        return {name: (u - 0.5) * steps[name] for name, u in uniform.items()}

    def _by_site(self, clean: _Clean, places: Tensor, stream: int, like: Tensor) -> Features:
        """Uniform numbers in [0, 1) by site, each sample's from its own stream: micro-batches do not matter."""
        sizes = [math.prod(shape) for shape in clean.shapes.values()]
        flat = _streams(self.seeds[places, stream], sum(sizes)).to(like).split(sizes, 1)
        named = {name: part.unflatten(1, clean.shapes[name]) for name, part in zip(clean.shapes, flat, strict=True)}
        return {name: named.get(name, like.new_zeros(len(places), 1)) for name in self.sites}  # 0: it did not run

    def _derivatives(
        self, clean: _Clean, x: Tensor, y: Tensor, places: Tensor, noise: list[Features]
    ) -> dict[str, Tensor]:
        """`traces`; and where they are exact, `seconds` and `linear`."""
        deltas = {name: torch.zeros_like(move).requires_grad_() for name, move in noise[0].items()}
        with torch.enable_grad(), _added(self.sites, deltas):
            outputs = self.subject.view(x)
        if self.method == "hutchinson":
            return {"traces": self._hutchinson(clean, outputs, y, places, deltas)}
        z = outputs.detach()
        if self.method == "exact":
            factor = cross_entropy_factor(z)
        else:
            factor = sampled_factor(z, self.labels[places].to(z.device), balanced=True)
        traces = torch.stack(
            [torch.stack([_squared(g) for g in self._backward(outputs, deltas, column)]) for column in factor]
        )
        if self.method == "sampled":
            return {"traces": traces}
        return {"traces": traces.sum(0, keepdim=True), **self._to_first_order(outputs, deltas, y, noise)}

    def _backward(self, outputs: Tensor, deltas: Features, cotangent: Tensor) -> tuple[Tensor, ...]:
        variables = list(deltas.values())
        return torch.autograd.grad(outputs, variables, cotangent, retain_graph=True, materialize_grads=True)

    def _to_first_order(self, outputs: Tensor, deltas: Features, y: Tensor, noise: list[Features]) -> dict[str, Tensor]:
        """What the noise does to logits that are linear in it: `seconds` and `linear`, see `_Found`."""
        slopes = []  # of each logit, (K, L, B): its change by each layer's noise
        for c in range(outputs.shape[1]):
            one = torch.zeros_like(outputs)
            one[:, c] = 1
            gradients = self._backward(outputs, deltas, one)
            slopes.append(
                torch.stack(
                    [
                        torch.stack([_dot(*pair) for pair in zip(gradients, moves.values(), strict=True)])
                        for moves in noise
                    ]
                )
            )
        moves = torch.stack(slopes, -1)  # (K, L, B, C)
        joint = moves.sum(1)
        moves = torch.cat([moves, joint[:, None]], 1)
        z = outputs.detach().cpu().double()
        p = z.softmax(1)
        seconds = ((p * moves.square()).sum(-1) - (p * moves).sum(-1).square()) / 2
        losses = self.subject.sample_losses
        linear = [
            torch.stack([(losses(z + size * move, y) + losses(z - size * move, y)) / 2 for move in joint])
            for size in self.sizes
        ]
        return {"seconds": seconds, "linear": torch.stack(linear) - losses(z, y)}

    def _hutchinson(self, clean: _Clean, outputs: Tensor, y: Tensor, places: Tensor, deltas: Features) -> Tensor:
        """(N_PROBES, L, B): samples do not mix, so one product gives each of them its own estimate."""
        variables = list(deltas.values())
        total = self.subject.loss(outputs, y) * len(y)
        first = torch.autograd.grad(total, variables, create_graph=True, materialize_grads=True)
        draws = []
        for k in range(N_PROBES):
            signs = [2 * u.round() - 1 for u in self._by_site(clean, places, self.n_draws + k, outputs).values()]
            slope = torch.stack([(g * v).sum() for g, v in zip(first, signs, strict=True)]).sum()
            products = [torch.zeros_like(v) for v in signs]
            if slope.requires_grad:  # otherwise the loss is linear
                products = list(torch.autograd.grad(slope, variables, retain_graph=True, materialize_grads=True))
            draws.append(torch.stack([_dot(h, v) for h, v in zip(products, signs, strict=True)]))
        return torch.stack(draws)


def _streams(seeds: Tensor, n: int) -> Tensor:
    """(B, n) float32 in [0, 1), each row by its own seed."""
    uniform = torch.empty(len(seeds), n)
    for row, seed in zip(uniform, seeds.tolist(), strict=True):
        torch.rand(n, generator=torch.Generator().manual_seed(seed), out=row)
    return uniform


def _squared(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g.flatten(1), dim=1).square().cpu().double()


def _dot(g: Tensor, move: Tensor) -> Tensor:
    return torch.linalg.vecdot(g.flatten(1), move.flatten(1)).cpu().double()


# --- Which trace ---


def _choose(subject: Subject, sites: dict[str, tuple[nn.Module, Quantizer]]) -> tuple[str, int]:
    """Method of the traces, and its backward passes or products."""
    try:
        if not subject.cross_entropy:
            raise NotExactError("the loss is not the cross-entropy")
        check_piecewise_linear(subject.view, subject.data, sites)
        method, _ = exact_or_sampled(subject, None)
    except NotExactError:
        return "hutchinson", N_PROBES
    if method == "sampled":
        return method, N_LABELS
    return method, exact_passes(subject.view, subject.data[0][0])


def check_piecewise_linear(
    view: nn.Module, data: list[Batch], sites: dict[str, tuple[nn.Module, Quantizer]], seed: int = 0
) -> None:
    """Return if the logits are piecewise linear in the input of every site; by numbers, not by a list of modules.

    As in `curvature/certificate.py`: on images spread over the data, and along a random direction in one site's input
    each, the second derivative of a random combination of the logits must vanish.  Images do not mix, so that one
    double backward in a scalar for each image does all.  A site without effect on its own images gets others.

    Raises:
        NotExactError: with the layer, and how curved it is, or that it had no effect on any image tried.
    """
    generator = torch.Generator().manual_seed(seed)
    left = list(sites)
    try:
        for turn in range(TURNS):
            x = spread(data, -(-FEWEST // len(left)) * len(left), turn)
            with full_precision(), torch.enable_grad():
                left = _without_effect(view, x, {name: sites[name][0] for name in left}, generator)
            if not left:
                return
    except RuntimeError as error:
        raise NotExactError(f"the check itself failed ({type(error).__name__}: {error})") from error
    raise NotExactError(f"'{left[0]}' had no effect on the images tried, so nothing is known of it")


def _without_effect(view: nn.Module, x: Tensor, layers: dict[str, nn.Module], generator: torch.Generator) -> list[str]:
    """Layers take turns with the images of `x`; returns those without effect on theirs, raises for curved ones."""
    owner = torch.arange(len(x), device=x.device) % len(layers)
    shift = torch.zeros(len(x), dtype=x.dtype, device=x.device, requires_grad=True)

    def mover(index: int) -> Any:
        def move(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            at = args[0]
            along = torch.randn(at.shape[1:], generator=generator).to(at)
            # As long as a feature itself, so that a change is relative to the size of its effect.
            along *= at.detach().norm() / (along.norm() * math.sqrt(len(at)))
            return (at + (shift * (owner == index)).view(-1, *[1] * (at.ndim - 1)) * along, *args[1:])

        return move

    handles = [layer.register_forward_pre_hook(mover(i)) for i, layer in enumerate(layers.values())]
    try:
        outputs = view(x)
    finally:
        for handle in handles:
            handle.remove()
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise NotExactError("the model's output is not one row of two or more logits for each input")
    r = torch.randn(outputs.shape, generator=generator).to(outputs)
    (first,) = torch.autograd.grad((outputs * r).sum(), shift, create_graph=True)
    second = torch.zeros_like(first)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), shift, materialize_grads=True)
    tolerance = 100 * torch.finfo(first.dtype).eps
    idle = []
    for index, name in enumerate(layers):
        slope, bend = (float(d.detach()[owner == index].abs().max()) for d in (first, second))
        if not bend <= tolerance * slope:
            raise NotExactError(f"the outputs are curved in the input of '{name}' ({bend:.1e} beside {slope:.1e})")
        if slope == 0:
            idle.append(name)
    return idle


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


def _rows(found: _Found, sizes: list[float], method: str, passes: int) -> Rows:
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
        products = 0 if how == "antithetic pairs" else passes
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
