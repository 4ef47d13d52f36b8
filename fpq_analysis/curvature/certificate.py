"""Is a model within the condition of the exact trace?  Decided by numbers, not by a list of modules.

A functional `F.gelu`, a product of two activations or a weight used outside its layer does not show in
`model.modules()`.  So, on a few images and for a random combination r . z of the logits:

1. the layer-by-layer formula must reproduce autograd's squared gradient norms, for every parameter and image;
2. along a random direction in each layer's parameters the second derivative of r . z must vanish.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import full_precision
from fpq_analysis.curvature.exact import NotExactError, _frozen, _Recorder, find_layers

IMAGES = 3


def certify(model: nn.Module, x: Tensor, parameters: dict[str, Tensor], seed: int = 0) -> None:
    """Return if the exact trace holds for `model`; raise otherwise.

    Args:
        model: in eval mode.
        x: inputs on the model's device; the first `IMAGES` are used.
        parameters: the variables, by name.

    Raises:
        NotExactError: with the layer and the reason.
    """
    x = x[:IMAGES]
    layers = find_layers(model, parameters)
    generator = torch.Generator().manual_seed(seed)
    with full_precision(), torch.enable_grad():
        with _frozen(model), _Recorder(layers, parameters, {}, 1) as recorder:
            logits = recorder.run(model, x)
        r = torch.randn(logits.shape, generator=generator).to(logits)
        formula = recorder.squared_norms(logits, r.unsqueeze(0))
        _check_first_derivatives(model, x, r, parameters, formula)
        _check_second_derivatives(model, x, r, parameters, layers, generator)


def _check_first_derivatives(
    model: nn.Module, x: Tensor, r: Tensor, parameters: dict[str, Tensor], formula: dict[str, Tensor]
) -> None:
    tolerance = torch.finfo(r.dtype).eps ** 0.5
    for i in range(len(x)):
        gradients = torch.autograd.grad(
            (model(x[i : i + 1]) * r[i : i + 1]).sum(), list(parameters.values()), allow_unused=True
        )
        squares = {
            name: 0.0 if g is None else float(g.double().square().sum())
            for name, g in zip(parameters, gradients, strict=True)
        }
        scale = max(squares.values())
        for name, value in squares.items():
            # A gradient that is all rounding error beside the others cannot be compared with itself.
            if abs(float(formula[name][i]) - value) > tolerance * (value + 1e-6 * scale):
                raise NotExactError(f"the gradient of '{name}' is not that of its layer alone: it is used elsewhere, or the layer's forward is its own")


def _check_second_derivatives(
    model: nn.Module,
    x: Tensor,
    r: Tensor,
    parameters: dict[str, Tensor],
    layers: dict[str, nn.Module],
    generator: torch.Generator,
) -> None:
    gradients = torch.autograd.grad(
        (model(x) * r).sum(), list(parameters.values()), create_graph=True, allow_unused=True
    )
    by_id = {id(p): g for p, g in zip(parameters.values(), gradients, strict=True)}
    tolerance = torch.finfo(r.dtype).eps ** 0.5
    for name, layer in layers.items():
        own = [p for p in layer.parameters(recurse=False) if by_id.get(id(p)) is not None]
        curved = [p for p in own if by_id[id(p)].requires_grad]  # type: ignore[union-attr]
        if not curved:
            continue
        # A direction as long as the parameters: the change is then relative to the gradient itself.
        directions = [torch.randn(p.shape, generator=generator).to(p) for p in curved]
        directions = [v * (p.detach().norm() / v.norm()) for v, p in zip(directions, curved, strict=True)]
        products = torch.autograd.grad(
            [by_id[id(p)] for p in curved], own, directions, retain_graph=True, allow_unused=True
        )
        change = sum(float(h.double().square().sum()) for h in products if h is not None) ** 0.5
        size = sum(float(by_id[id(p)].detach().double().square().sum()) for p in own) ** 0.5  # type: ignore[union-attr]
        if change > tolerance * size:
            raise NotExactError(f"the outputs are curved in the parameters of '{name}' (relative change {change / size:.1e})")
