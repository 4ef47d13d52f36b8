"""Is a model within the condition of the exact trace?  Decided by numbers, not by a list of modules.

A functional `F.gelu`, a product of two activations or a weight used outside its layer does not show in
`model.modules()`.  So, on images spread over the data and for a random combination r . z of the logits:

1. an image's logits must not depend on the other images of its batch;
2. the layer-by-layer formula must reproduce autograd's squared gradient norm, for every parameter;
3. along a random direction in each layer's parameters the second derivative of r . z must vanish.

For 3, moving a layer's parameters along v moves its output along layer(input; v), as it is linear in them.  Image n
gets a scalar of its own that moves one layer only; images do not mix, so the Hessian in all these scalars is diagonal,
and one double backward, through activations alone, checks every layer at once.

What this cannot see: a custom `autograd.Function` whose backward is not the derivative of its forward is taken at its
word, as in all of autograd (straight-through estimators are such functions, on purpose).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.exact import NotExactError, Recorder, find_layers, frozen
from fpq_analysis.curvature.samples import spread

# Images whose gradients are compared; the fewest for second derivatives, of which every layer gets an equal number; and
# how often a layer without effect on its own gets others.
GRADIENT_IMAGES = 2
FEWEST = 16
TURNS = 4


def certify(model: nn.Module, batches: list[Batch], parameters: dict[str, Tensor], seed: int = 0) -> set[str]:
    """Return if the exact trace holds for `model`; raise otherwise.

    Args:
        model: in eval mode, without quantized weights in the making (a plain view).
        batches: (inputs, targets) on the model's device; some images spread over them are used.
        parameters: the variables, by name.

    Returns:
        Names of layers that had no effect on any image tried (dead ones), of which therefore nothing is known: the
        trace is exact if their share of it turns out to be zero.

    Raises:
        NotExactError: with the layer and the reason.
    """
    layers = find_layers(model, parameters)
    generator = torch.Generator().manual_seed(seed)
    try:
        with full_precision(), torch.enable_grad():
            for image in spread(batches, GRADIENT_IMAGES).split(1):
                _check_first_derivatives(model, image, parameters, layers, generator)
            unchecked = set(layers)
            with frozen(model):
                for turn in range(TURNS):
                    if unchecked:
                        left = {name: layer for name, layer in layers.items() if name in unchecked}
                        images = spread(batches, -(-FEWEST // len(left)) * len(left), turn)
                        unchecked = _check_second_derivatives(model, images, parameters, left, generator)
            return unchecked
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise NotExactError(f"the check itself failed ({type(error).__name__}: {error})") from error


def _check_first_derivatives(
    model: nn.Module,
    image: Tensor,
    parameters: dict[str, Tensor],
    layers: dict[str, nn.Module],
    generator: torch.Generator,
) -> None:
    with frozen(model), Recorder(layers, parameters, {}, 1) as recorder:
        logits = recorder.run(model, image)
        r = torch.randn(logits.shape, generator=generator).to(logits)
        formula = recorder.squared_norms(logits, r.unsqueeze(0))
    found = torch.autograd.grad((model(image) * r).sum(), list(parameters.values()), allow_unused=True)
    squares = {name: 0.0 if g is None else float(g.square().sum()) for name, g in zip(parameters, found, strict=True)}
    tolerance = torch.finfo(r.dtype).eps ** 0.5
    scale = max(squares.values())
    for name, value in squares.items():
        # A gradient that is all rounding error beside the others cannot be compared with itself.
        if not abs(float(formula[name]) - value) <= tolerance * (value + 1e-6 * scale):
            raise NotExactError(
                f"the gradient of '{name}' is not that of its layer alone: it is used elsewhere, or its layer's "
                "forward is its own"
            )


def _check_second_derivatives(
    model: nn.Module, x: Tensor, parameters: dict[str, Tensor], layers: dict[str, nn.Module], generator: torch.Generator
) -> set[str]:
    """Layers take turns with the images of `x`; returns the names of those without effect on theirs."""
    variable = {id(p) for p in parameters.values()}
    owner = torch.arange(len(x), device=x.device) % len(layers)
    shift = torch.zeros(len(x), dtype=x.dtype, device=x.device, requires_grad=True)

    def mover(index: int, directions: dict[str, Tensor]) -> Any:
        def move(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            mine = shift * (owner == index)
            with torch.no_grad():
                # The class's own forward: calling the module would run this hook again.
                along = functional_call(_Bare(layer), {f"layer.{k}": v for k, v in directions.items()}, args)
            return output + mine.view(-1, *[1] * (output.ndim - 1)) * along

        return move

    handles = []
    try:
        for index, layer in enumerate(layers.values()):
            directions = {}
            for kind, p in layer.named_parameters(recurse=False):
                # As long as the parameter itself, so that a change is relative to the size of its effect.
                v = torch.randn(p.shape, generator=generator).to(p)
                directions[kind] = v * (p.detach().norm() / v.norm()) if id(p) in variable else torch.zeros_like(p)
            handles.append(layer.register_forward_hook(mover(index, directions)))
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return _without_effect(logits, shift, owner, list(layers), "parameters", generator)


def certify_features(
    model: nn.Module, batches: list[Batch], layers: dict[str, nn.Module], generator: torch.Generator
) -> None:
    """Return if the logits are piecewise linear in the input of every layer; raise otherwise.

    As `certify` finds it out: images do not mix, so one double backward in a scalar for each does all.

    Args:
        model: in eval mode, and whose outputs for one image do not depend on the others.
        batches: (inputs, targets) on the model's device; some images spread over them are used.
        layers: by name; what is tried is their first argument.
        generator: of the directions, on the CPU.

    Raises:
        NotExactError: with the layer, and how curved it is, or that it had no effect on any image tried.
    """
    left = list(layers)
    try:
        for turn in range(TURNS):
            x = spread(batches, -(-FEWEST // len(left)) * len(left), turn)
            with full_precision(), torch.enable_grad():
                idle = _check_features(model, x, {name: layers[name] for name in left}, generator)
            left = [name for name in left if name in idle]
            if not left:
                return
    except RuntimeError as error:
        raise NotExactError(f"the check itself failed ({type(error).__name__}: {error})") from error
    raise NotExactError(f"'{left[0]}' had no effect on the images tried, so nothing is known of it")


def _check_features(model: nn.Module, x: Tensor, layers: dict[str, nn.Module], generator: torch.Generator) -> set[str]:
    """Layers take turns with the images of `x`; returns the names of those without effect on theirs."""
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
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise NotExactError("the model's output is not one row of two or more logits for each input")
    return _without_effect(logits, shift, owner, list(layers), "input", generator)


def _without_effect(
    logits: Tensor, shift: Tensor, owner: Tensor, names: list[str], where: str, generator: torch.Generator
) -> set[str]:
    """Which layers' scalars do not move their images' logits; raises for those that do so along a curve.

    Args:
        shift: (N,) the images' scalars, at zero.
        owner: (N,) which of the named layers each moves.
        where: what of the layer it moves.
    """
    r = torch.randn(logits.shape, generator=generator).to(logits)
    (first,) = torch.autograd.grad((logits * r).sum(), shift, create_graph=True)
    second = torch.zeros_like(first)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), shift, materialize_grads=True)
    tolerance = 100 * torch.finfo(first.dtype).eps
    idle = set()
    for index, name in enumerate(names):
        slope, bend = (float(d.detach()[owner == index].abs().max()) for d in (first, second))
        if not bend <= tolerance * slope:
            raise NotExactError(f"the outputs are curved in the {where} of '{name}' ({bend:.1e} beside {slope:.1e})")
        if slope == 0:
            idle.add(name)
    return idle


class _Bare(nn.Module):
    """A layer's own computation, without the hooks on it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Tensor:
        return self.layer.forward(*args)
