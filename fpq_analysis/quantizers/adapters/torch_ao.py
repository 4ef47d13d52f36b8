"""Networks of `torch.ao.quantization`, prepared for training in eager mode or by FX (`prepare_qat`, `prepare_qat_fx`).

A layer fused with its BatchNorm rounds w gamma / sigma, and divides what comes out by gamma / sigma ahead of the
BatchNorm.  Here it is a convolution with the weight Q(w gamma / sigma) sigma / gamma, then the BatchNorm, which gives
the same.  So the weights of all definitions are in the units of w: `dequantized` is the weight as the BatchNorm behind
it sees it.  The slope gamma / sigma within Q is a part of the step size there, which is a constant.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.nn.intrinsic import qat as fused
from torch.ao.quantization import FakeQuantizeBase
from torch.nn import functional as F

from fpq_analysis.errors import UserError
from fpq_analysis.quantizers.adapters.adapter import UnknownQuantizerError, plain_layer, register_adapter
from fpq_analysis.quantizers.affine import Affine

PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric, torch.per_channel_affine_float_qparams)


@register_adapter(FakeQuantizeBase)
def fake_quantizer(module: Any) -> nn.Module:
    """Of activations: at the output of a layer, in `QuantStub`, or in a graph."""
    quantizer = affine(module, None)
    return nn.Identity() if quantizer is None else quantizer


@register_adapter(qat.Linear, qat.Conv1d, qat.Conv2d, qat.Conv3d, qat.Embedding)
def layer(module: Any) -> nn.Module:
    """A layer with a rounded weight."""
    kind = next(k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules."))
    return _plain(module, kind)


@register_adapter(fused.LinearReLU, fused.ConvReLU1d, fused.ConvReLU2d, fused.ConvReLU3d)
def layer_relu(module: Any) -> nn.Module:
    """The ReLU becomes a hook, ahead of that which rounds the output."""
    turned = layer(module)
    turned.register_forward_hook(_relu, prepend=True)
    return turned


@register_adapter(fused.ConvBn1d, fused.ConvBn2d, fused.ConvBn3d, fused.LinearBn1d)
def layer_bn(module: Any) -> nn.Module:
    """The BatchNorm, a module inside the layer, is called by a hook: see the top of this file."""
    bn = module.bn
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    if bool((factor == 0).any()):
        raise UserError("a BatchNorm's slope is zero, and the layer divides by it, so that its output is NaN")
    kind = nn.Linear if isinstance(module, nn.Linear) else (nn.Conv1d, nn.Conv2d, nn.Conv3d)[module.weight.ndim - 3]
    turned = _plain(module, kind, factor.reshape(-1, *[1] * (module.weight.ndim - 1)))
    turned.register_forward_hook(_batch_norm, prepend=True)
    return turned


@register_adapter(fused.ConvBnReLU1d, fused.ConvBnReLU2d, fused.ConvBnReLU3d)
def layer_bn_relu(module: Any) -> nn.Module:
    """Both."""
    module.register_forward_hook(_relu, prepend=True)
    return layer_bn(module)


def _relu(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return F.relu(output)


def _batch_norm(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return module.bn(output)  # type: ignore[operator]


def _plain(module: Any, kind: type[nn.Module], factor: Tensor | None = None) -> nn.Module:
    weight = module.weight.detach()
    quantizer = affine(module.weight_fake_quant, weight if factor is None else weight * factor, factor)
    del module.weight_fake_quant
    module.folded = factor  # what the layer multiplied its weight by
    return plain_layer(module, kind, quantizer)


@torch.no_grad()
def affine(module: Any, weight: Tensor | None, factor: Tensor | None = None) -> Affine | None:
    """With its scale as it stands; None if it is switched off.

    Args:
        weight: what it rounds, if that is a weight.
    """
    if not bool(module.fake_quant_enabled):
        return None
    if getattr(module, "is_dynamic", False):
        raise UnknownQuantizerError("its scale is of each batch, so that samples depend on each other")
    per_channel = module.qscheme in PER_CHANNEL
    if per_channel and weight is None:
        raise UnknownQuantizerError("it rounds activations with a scale for each channel, which no adapter here knows")
    settled = copy.deepcopy(module).float()  # the fused ones know float32 only,
    settled(torch.zeros(1) if weight is None else weight.float())  # and work their scale out when they run
    observer = getattr(settled, "activation_post_process", None)
    seen = [getattr(observer, name, torch.zeros(1)) for name in ("min_val", "max_val")]
    if not all(bool(t.isfinite().all()) for t in (settled.scale, *seen)):
        raise UserError(
            "it has seen no data yet, so it has no scale: run the network in training mode, or load a state"
        )
    dtype = module.scale.dtype if weight is None else weight.dtype
    return Affine(
        _constant(module, settled, "scale", weight, dtype),
        _constant(module, settled, "zero_point", weight, dtype),
        int(module.activation_post_process.quant_min),
        int(module.activation_post_process.quant_max),
        factor=factor,
    )


def _constant(module: Any, settled: Any, name: str, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A scale or zero point in the form that broadcasts; a learned one stays a parameter."""
    value = getattr(settled, name).detach().to(dtype)
    if module.qscheme in PER_CHANNEL and weight is not None:
        shape = [1] * weight.ndim
        shape[module.ch_axis] = -1
        value = value.reshape(shape)
    else:
        value = value.reshape(())
    return nn.Parameter(value) if isinstance(getattr(module, name), nn.Parameter) else value
