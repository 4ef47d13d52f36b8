"""Is a model within the condition of the exact trace?  Proven, not tried out.

A functional `F.gelu`, a product of two activations or a weight used outside its layer does not show in
`model.modules()`, and a trial misses bends that are rare, or lost in rounding.  So:

1. the autograd graph proves that the outputs are piecewise linear in each variable, and uses it once (`graph.py`);
2. on some images the layer-by-layer formula must reproduce autograd's squared gradient norm, for every variable: a
   subclass or a hook may compute something else than its layer.

That an image's outputs do not depend on the other images is `samples.py`'s.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.exact import FEW
from fpq_analysis.curvature.graph import prove, prove_parameters, requiring_grad
from fpq_analysis.curvature.layers import Recorder, check_rows, find_layers
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.curvature.operations import NotExactError
from fpq_analysis.curvature.samples import spread
from fpq_analysis.nests import Nest, size, split, take

GRADIENT_IMAGES = 2  # whose gradients are compared


def certify(
    model: nn.Module, batches: list[Batch], parameters: dict[str, Tensor], seed: int = 0, proof: bool = True
) -> None:
    """Return if the exact trace holds for `model`; raise otherwise.

    The proof is for the graph of the first batch; `per_sample_traces` repeats it for every other that occurs.

    Args:
        model: in eval mode, without quantized weights in the making (a plain view).
        batches: (inputs, targets) on the model's device.
        parameters: the variables, by name.
        proof: False for gradients alone: whether the formula of layers gives them, whatever stands between.

    Raises:
        NotExactError: with the operation or the layer, and the reason.
    """
    layers = find_layers(model, parameters)
    generator = torch.Generator().manual_seed(seed)
    try:
        with full_precision(), torch.enable_grad():
            if proof:
                prove_parameters(model, take(batches[0][0], slice(FEW)), parameters)
            for image in split(spread(batches, GRADIENT_IMAGES), 1):
                _check_first_derivatives(model, image, parameters, layers, generator)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise NotExactError(f"the check itself failed ({type(error).__name__}: {error})") from error


def _check_first_derivatives(
    model: nn.Module,
    image: Nest,
    parameters: dict[str, Tensor],
    layers: dict[str, nn.Module],
    generator: torch.Generator,
) -> None:
    with requiring_grad(model), Recorder(layers, parameters, {}, 1) as recorder:
        logits = recorder.run(model, image)
        r = torch.randn(logits.shape, generator=generator, dtype=torch.float32).to(logits)
        formula = recorder.squared_norms(logits, r.unsqueeze(0))
    with requiring_grad(model, parameters.values()):
        found = torch.autograd.grad((model(image) * r).sum(), list(parameters.values()), allow_unused=True)
    squares = {name: 0.0 if g is None else float(g.square().sum()) for name, g in zip(parameters, found, strict=True)}
    tolerance = torch.finfo(r.dtype).eps ** 0.5
    scale = max(squares.values())
    for name, value in squares.items():
        if not math.isfinite(float(formula[name]) + value):
            continue  # nothing to compare: a square overflows; where that happens to the trace, it is refused as such
        # A gradient that is all rounding error beside the others cannot be compared with itself.
        if not abs(float(formula[name]) - value) <= tolerance * (value + 1e-6 * scale):
            raise NotExactError(
                f"the gradient of '{name}' is not that of its layer alone: it is used elsewhere, or its layer's "
                "forward is its own"
            )


def certify_features(model: nn.Module, batches: list[Batch], layers: dict[str, nn.Module]) -> None:
    """Return if the outputs are piecewise linear in the input of every layer; raise otherwise.

    Args:
        model: in eval mode, and whose outputs for one image do not depend on the others.
        batches: (inputs, targets) on the model's device; the graph of each is gone through.
        layers: by name; their first argument is the variable.

    Raises:
        NotExactError: with the operation and the layer.
    """
    moves: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def move(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            leaf = moves[f"the input of '{name}'"] = torch.zeros_like(args[0]).requires_grad_()
            return (args[0] + leaf, *args[1:])

        return move

    def work(batch: tuple[Tensor, ...]) -> None:
        prove(model, lambda: check_rows(model(batch[0]), size(batch)), lambda: moves)

    try:
        with ExitStack() as hooks, full_precision(), torch.enable_grad(), requiring_grad(model):
            for name, layer in layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(hook(name)))
            for _ in map_batches(list(batches), work):
                pass
    except RuntimeError as error:
        raise NotExactError(f"the check itself failed ({type(error).__name__}: {error})") from error
