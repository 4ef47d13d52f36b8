"""Is a model within the condition of the exact trace?  Decided by numbers, not by a list of modules.

A functional `F.gelu`, a product of two activations or a weight used outside its layer does not show in
`model.modules()`.  So, on an image or two and for a random combination r . z of the logits:

1. the layer-by-layer formula must reproduce autograd's squared gradient norm, for every parameter;
2. along a random direction in each layer's parameters the second derivative of r . z must vanish.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import full_precision
from fpq_analysis.curvature.exact import NotExactError, _frozen, _Recorder, find_layers

IMAGES = 2

Gradients = Mapping[str, Tensor | None]


def certify(model: nn.Module, x: Tensor, parameters: dict[str, Tensor], seed: int = 0) -> None:
    """Return if the exact trace holds for `model`; raise otherwise.

    Args:
        model: in eval mode.
        x: inputs on the model's device; the first `IMAGES` are used, one at a time.
        parameters: the variables, by name.

    Raises:
        NotExactError: with the layer and the reason.
    """
    layers = find_layers(model, parameters)
    generator = torch.Generator().manual_seed(seed)
    with full_precision(), torch.enable_grad():
        for image in x[:IMAGES].split(1):
            with _frozen(model), _Recorder(layers, parameters, {}, 1) as recorder:
                logits = recorder.run(model, image)
                r = torch.randn(logits.shape, generator=generator).to(logits)
                formula = recorder.squared_norms(logits, r.unsqueeze(0))
            found = torch.autograd.grad(
                (model(image) * r).sum(), list(parameters.values()), create_graph=True, allow_unused=True
            )
            gradients = dict(zip(parameters, found, strict=True))
            _check_first_derivatives(gradients, formula)
            _check_second_derivatives(gradients, parameters, layers, generator)


def _check_first_derivatives(gradients: Gradients, formula: dict[str, Tensor]) -> None:
    squares = {name: 0.0 if g is None else _square(g) for name, g in gradients.items()}
    scale = max(squares.values())
    for name, value in squares.items():
        # A gradient that is all rounding error beside the others cannot be compared with itself.
        if abs(float(formula[name]) - value) > _tolerance(gradients) * (value + 1e-6 * scale):
            raise NotExactError(
                f"the gradient of '{name}' is not that of its layer alone: it is used elsewhere, or the layer's "
                "forward is its own"
            )


def _check_second_derivatives(
    gradients: Gradients, parameters: dict[str, Tensor], layers: dict[str, nn.Module], generator: torch.Generator
) -> None:
    by_id = {id(p): gradients[name] for name, p in parameters.items()}
    for name, layer in layers.items():
        own = [p for p in layer.parameters(recurse=False) if by_id.get(id(p)) is not None]
        curved = [p for p in own if by_id[id(p)].requires_grad]  # type: ignore[union-attr]
        if not curved:
            continue
        # A direction as long as the parameters: the change is then relative to the gradient itself.
        directions = [torch.randn(p.shape, generator=generator).to(p) for p in curved]
        directions = [v * (p.detach().norm() / v.norm()) for v, p in zip(directions, curved, strict=True)]
        products = torch.autograd.grad(
            [by_id[id(p)] for p in curved],  # type: ignore[arg-type]
            own,
            directions,
            retain_graph=True,
            allow_unused=True,
        )
        change = sum(_square(h) for h in products if h is not None) ** 0.5
        size = sum(_square(by_id[id(p)]) for p in own) ** 0.5
        if change > _tolerance(gradients) * size:
            raise NotExactError(
                f"the outputs are curved in the parameters of '{name}' (relative change {change / size:.1e})"
            )


def _square(x: Tensor | None) -> float:
    return 0.0 if x is None else float(x.detach().double().square().sum())


def _tolerance(gradients: Gradients) -> float:
    """Between the rounding error of a true zero and the smallest curvature that would matter."""
    return float(next(torch.finfo(g.dtype).eps for g in gradients.values() if g is not None) ** 0.5)
