"""Quantize any `nn.Module` without rewriting it.

Weights go through `torch.nn.utils.parametrize`, inputs through a forward pre-hook: every layer stays the `nn.Conv2d` or
`nn.Linear` it was, under the name it had, and hooks on it see the quantized input.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fpq_analysis.errors import UserError
from fpq_analysis.methods import SCHEMES, load_class
from fpq_analysis.quantizers.base import Quantizer, widened
from fpq_analysis.quantspec import FLOAT_BITS, QuantSpec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
QUANTIZABLE = (*CONVOLUTIONS, nn.Linear)
INPUT_QUANTIZER = "input_quantizer"
OF_WEIGHT = r"parametrizations\.weight\.\d+"


def quantize(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of `model` whose convolution and linear layers are quantized; the original is not changed.

    The first and the last such layer (in the order of `model.modules()`) get `spec.edge_bits`.  Weights are calibrated
    here; inputs by `calibrate`, or by loading a state dict.

    Raises:
        UserError: if the model has no layer to quantize, or is quantized already.
    """
    if any(True for _ in quantizers(model)):
        raise UserError("The model is quantized already; quantize its float original.")
    model = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, QUANTIZABLE)]
    if not layers:
        raise UserError("The model has no convolution or linear layer, so there is nothing to quantize.")
    if len({id(layer.weight) for layer in layers}) < len(layers):
        raise UserError("Two layers share one weight, which would be quantized twice; give each its own.")
    of_weight, of_input = load_class(SCHEMES[spec.scheme].weight), load_class(SCHEMES[spec.scheme].activation)
    for layer in layers:
        on_edge = layer is layers[0] or layer is layers[-1]
        weight_bits, act_bits = (
            spec.edge_bits if on_edge and bits != FLOAT_BITS else bits for bits in (spec.weight_bits, spec.act_bits)
        )
        if weight_bits != FLOAT_BITS:
            quantizer = of_weight(weight_bits, layer.weight.shape[0], layer.weight.ndim).to(layer.weight.device)
            quantizer.calibrate(layer.weight, spec.weight_calibration)
            parametrize.register_parametrization(layer, "weight", quantizer)
        if act_bits != FLOAT_BITS:
            quantize_input(layer, of_input(act_bits).to(layer.weight.device))
    return model


def quantize_input(layer: nn.Module, quantizer: Quantizer) -> None:
    """Put `quantizer` in front of the layer."""
    layer.register_module(INPUT_QUANTIZER, quantizer)
    layer.register_forward_pre_hook(_quantize_input)


def _quantize_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(layer, INPUT_QUANTIZER)(args[0]), *args[1:])


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, how: str) -> None:
    """Set the scales of all inputs in one forward pass over `images`, in eval mode; the mode is restored.

    Each input is observed behind layers that are quantized already, so it sees the values it will work on.

    Args:
        model: of `quantize`; changed in place.
        images: what the model is called with, on its device.
        how: `mse` (least squared error) or `minmax`.

    Raises:
        UserError: if a quantized layer does not run in the forward pass.
    """
    inputs = [q for _, q, is_weight in quantizers(model) if not is_weight]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for quantizer in inputs:
            quantizer.observing = how
        model(images)
    finally:
        for quantizer in inputs:
            quantizer.observing = None
        for module, mode in modes.items():
            module.training = mode
    missed = [name for name, quantizer, is_weight in quantizers(model) if not is_weight and quantizer.step_size.isnan()]
    if missed:
        raise UserError(
            f"The calibration images did not reach {len(missed)} layers (first: '{missed[0]}'), so their inputs have "
            "no scale. Layers that the forward pass leaves out, such as auxiliary heads, cannot be quantized."
        )


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer, bool]]:
    """(name of the layer, quantizer, whether it is the weight's) for every quantizer of the model.

    One that is of no layer's weight or input, as those at outputs of other programs' networks, goes by its own name.
    """
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            layer = re.sub(rf"(^|\.)({OF_WEIGHT}|{INPUT_QUANTIZER})$", "", name)
            yield layer, module, bool(re.search(rf"(^|\.){OF_WEIGHT}$", name))


def stored_quantizers(state: dict[str, Tensor], spec: QuantSpec) -> Iterator[tuple[str, Quantizer, bool]]:
    """What `quantizers` gives, from the state dict of a network quantized by `spec`.

    Raises:
        KeyError, RuntimeError: if the state is not of such a network.
    """
    of_weight, of_input = load_class(SCHEMES[spec.scheme].weight), load_class(SCHEMES[spec.scheme].activation)
    found: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for name, value in state.items():
        if match := re.fullmatch(rf"(.*)\.(parametrizations\.weight\.0|{INPUT_QUANTIZER})\.(\w+)", name):
            found.setdefault((match[1], match[2] != INPUT_QUANTIZER), {})[match[3]] = value
    layers = [layer for layer, _ in found]
    for (layer, is_weight), own in found.items():
        bits = spec.weight_bits if is_weight else spec.act_bits
        bits = spec.edge_bits if layer in (layers[0], layers[-1]) else bits
        weight = state[f"{layer}.parametrizations.weight.original"] if is_weight else None
        quantizer = of_input(bits) if weight is None else of_weight(bits, weight.shape[0], weight.ndim)
        quantizer.load_state_dict(own)
        yield layer, quantizer, is_weight


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Step sizes, offsets, clipping levels: everything quantizers learn."""
    return [p for _, quantizer, _ in quantizers(model) for p in quantizer.parameters()]


@contextmanager
def fused_quantizers(model: nn.Module) -> Iterator[None]:
    """Inside, activations are quantized in the fast form, which can be differentiated in the step size once only."""
    inputs = [q for _, q, is_weight in quantizers(model) if not is_weight]
    try:
        for quantizer in inputs:
            quantizer.fused = True
        yield
    finally:
        for quantizer in inputs:
            quantizer.fused = False


def latent_weight(layer: nn.Module) -> nn.Parameter:
    """The trained weight behind the quantized one."""
    return layer.parametrizations["weight"].original  # type: ignore[union-attr, index]


@torch.no_grad()
def clipped_fraction(model: nn.Module) -> float:
    """Share of the quantized weights that lie outside their grid; 0 for a float model."""
    masks = [quantizer.clipped(widened(weight)) for quantizer, weight in weight_quantizers(model).values()]
    total = sum(mask.numel() for mask in masks)
    return sum(int(mask.sum()) for mask in masks) / total if total else 0.0


def weight_quantizers(model: nn.Module) -> dict[str, tuple[Quantizer, nn.Parameter]]:
    """Layer name to quantizer and trained weight, for every quantized weight."""
    modules = dict(model.named_modules())
    return {name: (q, latent_weight(modules[name])) for name, q, is_weight in quantizers(model) if is_weight}


@torch.no_grad()
def weight_codes(model: nn.Module) -> dict[str, Tensor]:
    """Layer name to the whole numbers its weight is stored as, for every quantized weight."""
    return {name: quantizer.codes(weight) for name, (quantizer, weight) in weight_quantizers(model).items()}


def changed_fraction(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Share of the quantized weights whose code differs between two results of `weight_codes`; 0 if there are none."""
    total = sum(codes.numel() for codes in after.values())
    changed = [(before[name] != codes).sum() for name, codes in after.items()]
    return int(torch.stack(changed).sum()) / total if total else 0.0


@torch.no_grad()
def step_sizes(model: nn.Module) -> dict[str, list[float]]:
    """`<layer>.weight` and `<layer>.input` to [smallest, median, largest] step size, or [the one] of a whole tensor.

    Numbers have four digits: enough to draw.
    """
    names, values = [], []
    for name, quantizer, is_weight in quantizers(model):
        names.append(f"{name}.{'weight' if is_weight else 'input'}".lstrip("."))
        s = quantizer.step_size.float().flatten()
        values.append(torch.stack([s.min(), s.median(), s.max()]))
    if not names:
        return {}
    rows = torch.stack(values).tolist()  # one wait for the device
    rounded = ([float(f"{value:.4g}") for value in row] for row in rows)
    return {name: row[:1] if row[0] == row[2] else row for name, row in zip(names, rounded, strict=True)}
