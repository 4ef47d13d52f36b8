"""Networks of Brevitas (`brevitas.nn`).

By default a weight's scale is its largest magnitude, worked out in each forward pass and differentiated through, and
the gradient passes the clip: dQ/dw is no mask.  So Brevitas' own function stays the quantizer of a weight.  The scales
of activations are constants once the training is over.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas import nn as qnn
from brevitas.core.function_wrapper import TensorClamp
from brevitas.core.quant import RescalingIntQuant
from brevitas.core.stats.view_wrapper import _ViewCatParameterWrapper, _ViewParameterWrapper
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from torch import Tensor, nn

from fpq_analysis.errors import UserError
from fpq_analysis.quantizers.adapters.adapter import (
    UnknownQuantizerError,
    plain_layer,
    quantize_output,
    register_adapter,
)
from fpq_analysis.quantizers.affine import Affine
from fpq_analysis.quantizers.apply import quantize_input
from fpq_analysis.quantizers.base import Quantizer


class BrevitasWeight(Quantizer):
    """The function by which Brevitas quantizes a weight.

    Args:
        function: gives (value, scale, zero point, bit width) of a weight.
        weight: as it is now; the step size said is that for this one.
    """

    def __init__(self, function: Any, weight: Tensor) -> None:
        low, high = _range(function)
        super().__init__((high - low).bit_length())
        self.low, self.levels = low, high - low
        self.function = function
        w = weight.detach().requires_grad_()
        with torch.enable_grad():
            _, scale, zero, _ = function(w)
            moved = [t for t in (scale, zero) if t.requires_grad]
            slopes = torch.autograd.grad([t.sum() for t in moved], w, allow_unused=True) if moved else (None,)
        self.elementwise = slopes[0] is None
        scale, zero = self._constants(weight)
        self.register_buffer("step_size", scale)
        self.register_buffer("zero_point", zero)

    def quantize(self, x: Tensor) -> Tensor:
        """As Brevitas does, gradient and all."""
        value: Tensor = self.function(x)[0]
        return value

    @torch.no_grad()
    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, scale, zero, _ = self.function(x.detach())
        return scale.clone(), (zero - self.low).clone()

    @torch.no_grad()
    def position(self, x: Tensor) -> Tensor:
        """In the steps of x itself."""
        scale, zero = self._constants(x)
        return x / scale + zero

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """On the grid of x itself."""
        scale, zero = self._constants(x)
        k = (self(x) / scale + zero).round()
        return k.to(torch.uint8 if self.bits <= 8 else torch.int32)

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Where the rounded value is outside of the grid, though the gradient may pass."""
        k = self.position(x).round()
        return (k < 0) | (k > self.levels)


@register_adapter(qnn.QuantLinear, qnn.QuantConv1d, qnn.QuantConv2d, qnn.QuantConv3d, qnn.QuantEmbedding)
def layer(module: Any) -> nn.Module:
    """A layer with a quantized weight, and maybe input and output."""
    _check_mode(module)
    kind = next(k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules."))
    if getattr(module, "bias_quant", None) is not None and module.bias_quant.is_quant_enabled:
        raise UnknownQuantizerError("its bias is quantized too")
    weight = _of_weight(module)
    inputs, output = (_of_activations(getattr(module, name, None)) for name in ("input_quant", "output_quant"))
    for name in ("weight_quant", "bias_quant", "input_quant", "output_quant"):
        module._modules.pop(name, None)
    turned = plain_layer(module, kind, weight, inputs)
    if output is not None:
        quantize_output(turned, output)
    return turned


@register_adapter(QuantNonLinearActLayer)
def activation(module: Any) -> nn.Module:
    """The plain activation, its input and output quantized; of an identity, the quantizer alone."""
    _check_mode(module)
    inputs, output = _of_activations(module.input_quant), _of_activations(module.act_quant)
    proxy = module.act_quant.fused_activation_quant_proxy
    function = nn.Identity() if proxy is None else proxy.activation_impl
    if inputs is None and output is not None and isinstance(function, nn.Identity):
        return output
    if inputs is not None:
        quantize_input(function, inputs)
    if output is not None:
        quantize_output(function, output)
    return function


def _check_mode(module: Any) -> None:
    if module.export_mode:
        raise UserError("it is in export mode, for inference; set export_mode = False first")


def _of_weight(module: Any) -> BrevitasWeight | None:
    proxy = module.weight_quant
    if not proxy.is_quant_enabled:
        return None
    function: Any = getattr(proxy, "tensor_quant", None)
    if type(proxy) is not WeightQuantProxyFromInjector or type(function) is not RescalingIntQuant:
        raise UnknownQuantizerError(f"its weight is quantized by a {type(function).__name__}")
    for part in function.modules():
        if isinstance(part, _ViewCatParameterWrapper):
            raise UnknownQuantizerError("its weight shares a scale with other weights")
        if isinstance(part, _ViewParameterWrapper):  # the weight once more, which is not used if it is handed over
            del part._parameters["parameter"]
            part.parameter = None
    return BrevitasWeight(function, module.weight)


@torch.no_grad()
def _of_activations(proxy: Any) -> Affine | None:
    if proxy is None or not proxy.is_quant_enabled:
        return None
    fused = proxy.fused_activation_quant_proxy
    function = fused.tensor_quant
    if type(proxy) is not ActQuantProxyFromInjector or type(function) is not RescalingIntQuant:
        raise UnknownQuantizerError(f"activations are quantized by a {type(function).__name__}")
    if not isinstance(function.int_quant.tensor_clamp_impl, TensorClamp):
        raise UnknownQuantizerError("the gradient of its activations passes the clip")
    like = next((t for t in (*function.parameters(), *function.buffers()) if t.is_floating_point()), torch.zeros(1))
    _, scale, zero, _ = function(torch.zeros(1).to(like))
    low, high = _range(function)
    learned = any(p.requires_grad for p in function.scaling_impl.parameters())
    scale = nn.Parameter(scale.detach().clone()) if learned else scale.detach().clone()
    return Affine(scale, zero.detach().to(scale).clone(), low, high, quotient=True)


@torch.no_grad()
def _range(function: Any) -> tuple[int, int]:
    """The least and the largest whole number."""
    width = function.msb_clamp_bit_width_impl()
    low, high = function.int_quant.min_int(width), function.int_quant.max_int(width)
    return round(float(low)), round(float(high))
