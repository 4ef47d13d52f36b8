"""What noise in the features does to every sample: losses under it, and derivatives in feature space.

The passes through the network behind `noise.py`, whose head says what is measured and why.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fpq_analysis.choices import N_LABELS
from fpq_analysis.curvature import NotExactError
from fpq_analysis.curvature.batches import full_precision
from fpq_analysis.curvature.certificate import certify_features
from fpq_analysis.curvature.exact import exact_passes
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.errors import UserError
from fpq_analysis.losses import draw_uniforms
from fpq_analysis.nests import Nest, leaves, moved, size
from fpq_analysis.probes.sample_traces import exact_or_sampled
from fpq_analysis.probes.subject import Subject
from fpq_analysis.progress import Progress
from fpq_analysis.quantizers import FeatureNoise, Quantizer, quantizers
from fpq_analysis.quantizers.noise import uniform_rows
from fpq_analysis.ranks import gathered, share

OWN = 1.0  # the size of FPQ's noise; layers alone are measured at it
ALONE = 2  # draws for noise in one layer
N_PROBES = 32
KINDS = ("surrogate", "real")

# By layer, a tensor (B, *features) at its input.
Features = dict[str, Tensor]
# By layer, the convolution that gets noise and its input's quantizer.
Sites = dict[str, tuple[nn.Module, Quantizer]]


@dataclass(frozen=True)
class Responses:
    """What all samples gave; L layers, S sizes, K draws, N samples, float64 on the CPU.

    Attributes:
        method: of the traces, `exact`, `sampled` or `hutchinson`; n_products: its backward passes or products.
        layers: names; steps: their s_l.
        traces: (draws, L, N) estimates of Tr(H_l) of each sample's loss; one draw if exact.
        seconds: (K, L + 1, N) each draw's second-order term at size 1, by noise in one layer and, last, in all; None
            if the traces are not exact.
        linear: (S, K, N) even parts of the change of loss at z + J d, or None.
        joint: by kind, (2, S, K, N) even and odd parts, noise in all layers.
        alone: by kind, (L, ALONE, N) even parts at size 1, noise in one layer.
    """

    method: str
    n_products: int
    layers: list[str]
    steps: Tensor
    traces: Tensor
    seconds: Tensor | None
    linear: Tensor | None
    joint: dict[str, Tensor]
    alone: dict[str, Tensor]


def respond(subject: Subject, sizes: list[float], n_draws: int, seed: int) -> Responses:
    """Measure all samples; the subject's view no longer wants gradients of its parameters afterwards.

    Args:
        sizes: of the noise, with `OWN` among them.
        n_draws: pairs of opposite noise for each sample, at least `ALONE`.
        seed: of the noise, of probes and of drawn labels.

    Raises:
        UserError: if no convolution's input is quantized, or one runs more than once in a forward pass.
    """
    sites = _sites(subject.view)
    subject.view.requires_grad_(False)  # a copy of our own; backward passes then reach features only
    method, n_products = _choose(subject, sites)
    joined = _Measurement(subject, sites, sizes, method, n_draws, seed).run()
    return Responses(
        method,
        n_products,
        list(sites),
        torch.stack([quantizer.step_size.detach().cpu().double() for _, quantizer in sites.values()]),
        joined["traces"],
        joined.get("seconds"),
        joined.get("linear"),
        {kind: joined[f"joint {kind}"] for kind in KINDS},
        {kind: joined[f"alone {kind}"] for kind in KINDS},
    )


def _sites(view: nn.Module) -> Sites:
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
def _added(sites: Sites, moves: Features, size: float = 1.0) -> Iterator[None]:
    """Inside, size times the move is added to what these layers' quantizers give."""

    def adder(move: Tensor) -> Any:
        return lambda layer, args: (torch.add(args[0], move, alpha=size), *args[1:])

    with ExitStack() as hooks:
        for name, move in moves.items():
            hooks.enter_context(sites[name][0].register_forward_pre_hook(adder(move)))
        yield


class _Clean:
    """What is needed to know of the pass without noise: the features, and each quantizer's straight line.

    The straight-through derivative q'(x0) is one in range and zero where clipped, so q(x0) + q'(x0) (x - x0) keeps
    the rounding residue in range, and the clipped value outside.
    """

    def __init__(self, view: nn.Module, sites: Sites, x: Nest) -> None:
        self.inputs = [quantizer for _, quantizer, is_weight in quantizers(view) if not is_weight]
        self.features: Features = {}
        self.lines: dict[Quantizer, list[tuple[Tensor, Tensor]]] = {}  # one a call
        names = {layer: name for name, (layer, _) in sites.items()}

        def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if names[layer] in self.features:
                raise UserError(
                    f"The layer '{names[layer]}' runs more than once in a forward pass, and noise is measured for "
                    "layers that run once. Give each call a layer of its own."
                )
            self.features[names[layer]] = args[0].detach()

        def fit(quantizer: Quantizer, args: tuple[Any, ...], output: Tensor) -> None:
            before = args[0].detach().requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(quantizer.forward(before).sum(), before)
            self.lines.setdefault(quantizer, []).append((slope, output - slope * before.detach()))

        with ExitStack() as hooks, torch.no_grad():
            for layer in names:
                hooks.enter_context(layer.register_forward_pre_hook(look))
            for quantizer in self.inputs:
                hooks.enter_context(quantizer.register_forward_hook(fit))
            self.outputs = view(x)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, every quantizer of an input is its straight line."""

        def line(calls: list[tuple[Tensor, Tensor]]) -> Any:
            turns = itertools.cycle(calls)  # as often in every pass

            def straight(x: Tensor) -> Tensor:
                slope, offset = next(turns)
                return torch.addcmul(offset, slope, x)

            return straight

        with ExitStack() as stack:
            for quantizer, at in self.lines.items():
                # In place of its own, which need not run.
                stack.enter_context(mock.patch.object(quantizer, "forward", line(at)))
            yield


class _Measurement:
    """Micro-batch by micro-batch: derivatives in feature space, and losses under noise."""

    def __init__(
        self,
        subject: Subject,
        sites: Sites,
        sizes: list[float],
        method: str,
        n_draws: int,
        seed: int,
    ) -> None:
        self.subject, self.sites, self.sizes, self.method = subject, sites, sizes, method
        self.n_draws = n_draws
        generator = torch.Generator().manual_seed(seed)
        self.seeds = torch.randint(2**31, (subject.n_data, n_draws + N_PROBES), generator=generator)
        self.labels = draw_uniforms(subject.n_data, N_LABELS, generator)

    def run(self) -> dict[str, Tensor]:
        """Fields of `Responses`, samples last."""
        places = torch.arange(self.subject.n_data).split(list(map(size, self.subject.data)))
        batches = [(x, y, place) for (x, y), place in zip(self.subject.data, places, strict=True)]
        with Progress(self.subject.n_data, "noise", "samples", 1), full_precision():
            parts = list(gathered(map_batches(share(batches), self._batch)))
        return {key: torch.cat([part[key] for part in parts], -1) for key in parts[0]}

    def _batch(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, y, places = batch
        view = self.subject.view
        clean = _Clean(view, self.sites, x)
        noise = [self._noise(clean, places, k, leaves(x)[0]) for k in range(self.n_draws)]
        found = self._derivatives(clean, x, y, places, noise)
        with torch.no_grad():
            found |= self._losses("real", x, y, noise)
            with clean.held():
                found |= self._losses("surrogate", x, y, noise)
        return found

    def _losses(self, kind: str, x: Nest, y: Nest, noise: list[Features]) -> dict[str, Tensor]:
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
        sizes = [x[0].numel() for x in clean.features.values()]
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds[places, stream].tolist()]
        flat = uniform_rows(generators, sum(sizes)).split(sizes, 1)
        named = {
            # In the layout of what it is added to: adding across layouts is slow.
            name: torch.empty_like(x).copy_(part.view(x.shape))
            for (name, x), part in zip(clean.features.items(), flat, strict=True)
        }
        return {name: named.get(name, like.new_zeros(len(places), 1)) for name in self.sites}  # 0: it did not run

    def _derivatives(self, clean: _Clean, x: Nest, y: Nest, places: Tensor, noise: list[Features]) -> dict[str, Tensor]:
        """`traces`; and where they are exact, `seconds` and `linear`."""
        deltas = {name: torch.zeros_like(move).requires_grad_() for name, move in noise[0].items()}
        with torch.enable_grad(), _added(self.sites, deltas):
            outputs = self.subject.view(x)
        if self.method == "hutchinson":
            return {"traces": self._hutchinson(clean, outputs, y, places, deltas)}
        z = outputs.detach()
        loss = self.subject.loss
        if self.method == "exact":
            factor = torch.cat(list(loss.factors(z, y)))
        else:
            factor = loss.drawn_factor(z, y, self.labels[places].to(z.device))
        traces = torch.stack(
            [torch.stack([_squared(g) for g in self._backward(outputs, deltas, column)]) for column in factor]
        )
        if self.method == "sampled":
            return {"traces": traces}
        return {"traces": traces.sum(0, keepdim=True), **self._to_first_order(outputs, deltas, y, noise)}

    def _backward(self, outputs: Tensor, deltas: Features, cotangent: Tensor) -> tuple[Tensor, ...]:
        variables = list(deltas.values())
        return torch.autograd.grad(outputs, variables, cotangent, retain_graph=True, materialize_grads=True)

    def _to_first_order(self, outputs: Tensor, deltas: Features, y: Nest, noise: list[Features]) -> dict[str, Tensor]:
        """What the noise does to logits that are linear in it: `seconds` and `linear`, see `Responses`."""
        slopes = []  # of each logit, (K, L, B): its change by each layer's noise
        for c in range(outputs[0].numel()):
            one = torch.zeros_like(outputs)
            one.view(len(one), -1)[:, c] = 1
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
        parts = [part.flatten(2) for part in self.subject.loss.factors(z, moved(y, z.device))]
        seconds = torch.einsum("nbc,klbc->nklb", torch.cat(parts), moves).square().sum(0) / 2
        joint = joint.reshape(len(joint), *z.shape)
        losses = self.subject.sample_losses
        linear = [
            torch.stack([(losses(z + size * move, y) + losses(z - size * move, y)) / 2 for move in joint])
            for size in self.sizes
        ]
        return {"seconds": seconds, "linear": torch.stack(linear) - losses(z, y)}

    def _hutchinson(self, clean: _Clean, outputs: Tensor, y: Nest, places: Tensor, deltas: Features) -> Tensor:
        """(N_PROBES, L, B): samples do not mix, so one product gives each of them its own estimate."""
        variables = list(deltas.values())
        total = self.subject.loss(outputs, y) * len(outputs)
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


def _squared(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g.flatten(1), dim=1).square().cpu().double()


def _dot(g: Tensor, move: Tensor) -> Tensor:
    return torch.linalg.vecdot(g.flatten(1), move.flatten(1)).cpu().double()


# --- Which trace ---


def _choose(subject: Subject, sites: Sites) -> tuple[str, int]:
    """Method of the traces, and its backward passes or products."""
    try:
        method, _ = exact_or_sampled(subject, None)
        layers = {name: layer for name, (layer, _) in sites.items()}
        certify_features(subject.view, subject.data, layers)
    except NotExactError:
        return "hutchinson", N_PROBES
    if method == "sampled":
        return method, N_LABELS
    return method, exact_passes(subject.view, subject.loss, subject.data[0])
