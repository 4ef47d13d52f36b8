"""Networks prepared by torchao: `quantize_(model, QATConfig(..., step="prepare"))`.

Scales of weights are worked out from the weights in each forward pass, unless they are learned, and are constants in
the gradient; they are frozen here as they stand.  Those of activations are of each token, and stay so.  Values are
clipped by `torch.clamp`, in the gradient, too: in newer versions what is rounded to the least or the largest whole
number has none, which at two bits is most of the weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.granularity import PerToken
from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, IntxFakeQuantizer
from torchao.quantization.quant_primitives import (
    _DTYPE_TO_QVALUE_BOUNDS,
    MappingType,
    ZeroPointDomain,
    choose_qparams_affine,
)

from fpq_analysis.quantizers.adapters.adapter import UnknownQuantizerError, plain_layer, register_adapter
from fpq_analysis.quantizers.affine import Affine, Dynamic


@register_adapter(FakeQuantizedLinear)
def linear(layer: Any) -> nn.Module:
    """Quantizes its input, and its weight by rows or by groups of a row."""
    weight, inputs = _of_weight(layer), _of_tokens(layer.activation_fake_quantizer)
    del layer.weight_fake_quantizer, layer.activation_fake_quantizer
    return plain_layer(layer, nn.Linear, weight, inputs)


@register_adapter(FakeQuantizedEmbedding)
def embedding(layer: Any) -> nn.Module:
    """Quantizes its weight."""
    weight = _of_weight(layer)
    del layer.weight_fake_quantizer
    return plain_layer(layer, nn.Embedding, weight)


@torch.no_grad()
def _of_weight(layer: Any) -> Affine | None:
    module, weight = layer.weight_fake_quantizer, layer.weight.detach()
    if module is None or not module.enabled:
        return None
    config = _config(module)
    if isinstance(config.granularity, PerToken):
        raise UnknownQuantizerError("it rounds a weight as if it were an activation")
    settled = copy.deepcopy(module).float()  # it knows no float64,
    settled(weight.float())  # and works its scale out when it runs
    if settled.scale.dtype in (torch.float16, torch.bfloat16):
        raise UnknownQuantizerError("it divides by its scale in half precision")
    low, high = _DTYPE_TO_QVALUE_BOUNDS[config.dtype]
    scale, zero = (_by_place(getattr(settled, name), weight) for name in ("scale", "zero_point"))
    if bool((zero != zero.round()).any()):
        raise UnknownQuantizerError("it has learned a zero point that is no whole number")
    scale = nn.Parameter(scale) if isinstance(module.scale, nn.Parameter) else scale
    return Affine(scale, zero, low, high, torch_clamp=True)


def _by_place(constant: Tensor, weight: Tensor) -> Tensor:
    """One a row as (rows, 1); of groups within a row, one a place."""
    constant = constant.detach().to(weight.dtype).reshape(len(weight), -1)
    groups = constant.shape[1]
    return constant if groups == 1 else constant.repeat_interleave(weight.shape[1] // groups, 1)


def _of_tokens(module: Any) -> Dynamic | None:
    if module is None or not module.enabled:
        return None
    config = _config(module)
    if not isinstance(config.granularity, PerToken) or not config.is_dynamic:
        raise UnknownQuantizerError("it rounds activations otherwise than token by token")
    low, high = _DTYPE_TO_QVALUE_BOUNDS[config.dtype]

    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        block = (1,) * (x.ndim - 1) + (x.shape[-1],)
        about = {"eps": config.eps, "scale_dtype": config.scale_precision}
        about["zero_point_dtype"] = config.zero_point_precision
        found = choose_qparams_affine(x.float(), MappingType.ASYMMETRIC, block, config.dtype, low, high, **about)
        scale, zero = (t.reshape(*x.shape[:-1], 1) for t in found)
        return scale, zero

    return Dynamic(choose, low, high, torch_clamp=True)


def _config(module: Any) -> Any:
    if not isinstance(module, IntxFakeQuantizer):
        raise UnknownQuantizerError(f"it has a {type(module).__name__}, which rounds to no grid of whole numbers")
    if module.config.zero_point_domain is not ZeroPointDomain.INT:
        raise UnknownQuantizerError("its zero point is no whole number")
    return module.config
