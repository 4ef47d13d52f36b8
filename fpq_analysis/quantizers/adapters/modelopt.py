"""Networks quantized by NVIDIA's Model Optimizer (`modelopt.torch.quantization.quantize`), to integers."""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.quantization.nn.modules.quant_module import QuantInputBase
from modelopt.torch.quantization.nn.modules.tensor_quantizer import TensorQuantizer
from torch import Tensor, nn

from fpq_analysis.errors import UserError
from fpq_analysis.quantizers.adapters.adapter import (
    UnknownQuantizerError,
    plain_layer,
    quantize_output,
    register_adapter,
)
from fpq_analysis.quantizers.affine import Affine
from fpq_analysis.quantizers.apply import QUANTIZABLE


class WithinMaximum(Affine):
    """Affine, with a gradient where |x| is at most `maximum`; with `passes` everywhere."""

    maximum: Tensor

    def __init__(self, maximum: Tensor, low: int, high: int, passes: bool) -> None:
        super().__init__(maximum / high, torch.zeros_like(maximum), low, high)
        self.register_buffer("maximum", maximum)
        self.passes = passes

    def quantize(self, x: Tensor) -> Tensor:
        """On the grid; straight-through."""
        moved = x - x.detach()
        return super().quantize(x).detach() + (moved if self.passes else moved * ~self.clipped(x))

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Where |x| is above the maximum."""
        return x.abs() > self.maximum


@register_adapter(QuantInputBase)
def layer(module: Any) -> nn.Module:
    """A layer whose input and output may be quantized, and of a convolution or linear layer the weight."""
    kind = next((k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules.")), nn.Module)
    if kind is nn.Module or ("weight_quantizer" in module._modules and not issubclass(kind, QUANTIZABLE)):
        raise UnknownQuantizerError(f"it is a {type(module).__name__}")
    parts = [module._modules.pop(f"{name}_quantizer", None) for name in ("weight", "input", "output")]
    weight, inputs, output = map(_quantizer, parts)
    for name in [name for name in vars(module) if name.startswith("_dm_")]:
        del module.__dict__[name]
    turned = plain_layer(module, kind, weight, inputs)
    if output is not None:
        quantize_output(turned, output)
    return turned


@register_adapter(TensorQuantizer)
def quantizer(module: Any) -> nn.Module:
    """That stands by itself."""
    return _quantizer(module) or nn.Identity()


def _quantizer(module: Any) -> WithinMaximum | None:
    if module is not None and type(module) is not TensorQuantizer:
        raise UnknownQuantizerError(f"it is quantized by a {type(module).__name__}")
    if module is None:
        return None
    if module.pre_quant_scale is not None or module.rotate_is_enabled:  # these stay where it is switched off
        raise UnknownQuantizerError("its values are scaled or rotated")
    if not module.is_enabled:
        return None
    if module._if_calib or not module._if_quant:
        raise UserError("it is being calibrated, and does not quantize meanwhile; end that first")
    bits, maximum = module.num_bits, module.amax
    if not isinstance(bits, int) or not module.fake_quant or maximum is None:
        raise UnknownQuantizerError("it is quantized otherwise than to integers within a known maximum")
    if module.block_sizes or module.bias:
        raise UnknownQuantizerError("its values are shifted, or taken by blocks")
    maximum = maximum.detach().clone()
    if bool((maximum <= 2**-24).any()):
        raise UnknownQuantizerError("a maximum of it is zero")
    high = 2 ** (bits - 1 + int(module.unsigned)) - 1
    low = 0 if module.unsigned else -high if module.narrow_range else -high - 1
    return WithinMaximum(maximum, low, high, bool(getattr(module, "_pass_through_bwd", False)))
