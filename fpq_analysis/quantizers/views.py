"""What "the Hessian of a quantized network" means: three views of one model.

Rounding makes the true loss piecewise constant in the trained weights, so every Hessian of a quantized network is that
of a surrogate.  Each definition is a copy of the model in which ordinary curvature code finds the right variables:

- `dequantized`: plain weights Q(w), those the network really uses.  Activation quantizers act through their
  straight-through derivative.  The default.
- `latent`: the trained w; straight-through, so clipped weights drop out: H_latent = M H_dequantized M with M the mask
  of weights in range.  A method that clips more looks flatter; always read it with the clipped fraction.
- `float`: the trained w with every quantizer taken off.

Step sizes are constants in all three.

For a model without quantizers the three are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fpq_analysis.choices import check_definition
from fpq_analysis.errors import UserError
from fpq_analysis.quantizers.adapters import adopt
from fpq_analysis.quantizers.apply import quantizer_parameters, quantizers, weight_quantizers
from fpq_analysis.quantizers.base import Quantizer
from fpq_analysis.quantizers.copies import eval_copy
from fpq_analysis.quantizers.others import learned_by_others


def view(model: nn.Module, definition: str, inputs: Any = None) -> nn.Module:
    """An eval-mode copy of `model` for the named definition; the model itself is not touched.

    Weights of less than float32 are widened, which changes none of them.

    Args:
        inputs: some of what the model is called with, to check on that other programs' quantizers are known well.

    Raises:
        UserError: if the definition is unknown, or see `adopt`.
    """
    check_definition(definition)
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            "The model is a TorchScript program (torch.jit.script or trace), whose layers cannot be changed. "
            "Give the module it was made from, with its weights: model.load_state_dict(scripted.state_dict())."
        )
    model = eval_copy(adopt(model, inputs))
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds & {torch.float16, torch.bfloat16}:
        # A second derivative in 8 or 11 bits is rounding, so it is that of these weights in float32.
        model.double() if torch.float64 in kinds else model.float()
    for parameter in (*quantizer_parameters(model), *learned_by_others(model)):
        parameter.requires_grad_(False)
    if definition != "latent":
        _take_off(model, definition)
    return model


def _take_off(model: nn.Module, definition: str) -> None:
    """In place: the weights' quantizers, and in `float` all others too."""
    layers = dict(model.named_modules())
    for name, _, is_weight in list(quantizers(model)):
        if is_weight:
            _own_class(layers[name])
            parametrize.remove_parametrizations(layers[name], "weight", leave_parametrized=definition == "dequantized")
    if definition == "float":
        for module in layers.values():
            for name, child in list(module._modules.items()):  # not named_children, which gives shared ones once
                if isinstance(child, Quantizer):
                    setattr(module, name, nn.Identity())


def _own_class(layer: nn.Module) -> None:
    """Give a copied layer a class of its own.

    `parametrize` keeps the weight as a property of a class it makes for the layer; a deep copy shares that class, and
    removing the parametrization from the copy would take the property from the original too.
    """
    shared = type(layer)
    members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    layer.__class__ = type(shared.__name__, shared.__bases__, members)


def variables(model: nn.Module) -> dict[str, Tensor]:
    """The parameters curvature is taken with respect to, by their plain names.

    All trainable parameters but the quantizers' own; the trained weight behind `conv1`'s quantizer is `conv1.weight`.
    """
    own = {id(p) for p in quantizer_parameters(model)}
    return {
        name.replace("parametrizations.weight.original", "weight"): p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in own
    }


def latent_derivatives(model: nn.Module) -> dict[str, Tensor]:
    """dQ(w)/dw for every quantized weight, by plain name: one in range, zero where clipped.

    Raises:
        UserError: if a weight's quantizer is not element-wise, so that its derivative is not a mask.
    """
    masks = {}
    for name, (quantizer, weight) in weight_quantizers(model).items():
        if not quantizer.elementwise:
            raise UserError(
                f"The weight quantizer of '{name}' mixes weights, so the latent Hessian has no simple diagonal. "
                "Use --definition dequantized, or a stochastic method."
            )
        w = weight.detach().requires_grad_()
        with torch.enable_grad():
            (masks[f"{name}.weight".lstrip(".")],) = torch.autograd.grad(quantizer(w).sum(), w)
    return masks
