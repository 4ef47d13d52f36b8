"""Other programs' quantized networks, turned into networks quantized as ours are."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize

from fpq_analysis.errors import UserError
from fpq_analysis.forward import Forward
from fpq_analysis.nests import size, split, take
from fpq_analysis.quantizers.adapters.agreement import check_agreement
from fpq_analysis.quantizers.adapters.inputs import name_input_quantizers
from fpq_analysis.quantizers.apply import quantize_input
from fpq_analysis.quantizers.base import Quantizer
from fpq_analysis.quantizers.copies import eval_copy
from fpq_analysis.quantizers.others import WEIGHT, check_not_converted, other_quantizers
from fpq_analysis.ranks.wrapped import unwrapped

Adapter = Callable[[Any], nn.Module]
A = TypeVar("A", bound=Adapter)
# The module of a class begins with the first; the file beside this one has the adapters of such classes.
FRONT_ENDS = {
    "torch.ao.": "torch_ao",
    "torchao.quantization.pt2e.": "pt2e",
    "torch.fx.graph_module": "pt2e",
    "torchao.": "torchao",
    "torchao.prototype.qat.": "torchao_blocks",
    "brevitas.": "brevitas",
    "modelopt.": "modelopt",
}
OUTPUT_QUANTIZER = "output_quantizer"
# Samples on which an adapter has to agree, and of these at once, as all that modules get and give is kept.
SHOWN, AT_ONCE = 16, 2
OBSERVERS = ("observer_enabled", "static_enabled")  # switches of those that set a scale by what passes through

_adapters: dict[type[nn.Module], Adapter] = {}


def register_adapter(*kinds: type[nn.Module]) -> Callable[[A], A]:
    """Decorator: this function turns a module of another program, of one of the classes `kinds`, into ours.

    It is given the module, in eval mode, of a copy made for measuring, and returns what takes its place:

    - for a layer with a quantized weight, the plain layer, its weight parametrized by a `Quantizer` (`plain_layer`);
    - for a quantizer of activations, a `Quantizer`; `nn.Identity()` if it is switched off.

    Modules inside what it returns are turned afterwards.  Subclasses are turned alike, unless they have adapters of
    their own.  Whether the result computes what the module computed is checked on the data, see `adopt`::

        @register_adapter(MyQuantLinear)
        def _(layer):
            return plain_layer(layer, nn.Linear, Affine(layer.scale, layer.zero_point, -8, 7))
    """

    def register(adapter: A) -> A:
        _adapters.update(dict.fromkeys(kinds, adapter))
        return adapter

    return register


class UnknownQuantizerError(Exception):
    """Raised by an adapter for a module that it does not know after all: the network is left as it is."""


def plain_layer(
    layer: nn.Module, kind: type[nn.Module], weight: Quantizer | None, inputs: Quantizer | None = None
) -> nn.Module:
    """`layer` itself as a `kind`, a base of its class, with these quantizers on its weight and input; its hooks stay.

    What else the layer has is left; take out submodules that are not used any more.

    Args:
        layer: the module, changed in place.
        kind: `nn.Linear`, say.
        weight, inputs: None where these are not quantized.
    """
    if parametrize.is_parametrized(layer):
        raise UnknownQuantizerError("it is parametrized by something else too")
    layer.__class__ = kind
    if weight is not None:
        parametrize.register_parametrization(layer, "weight", weight.eval())
    if inputs is not None:
        quantize_input(layer, inputs.eval())
    return layer


def quantize_output(module: nn.Module, quantizer: Quantizer) -> None:
    """Put `quantizer` behind the module, ahead of other hooks."""
    module.register_module(OUTPUT_QUANTIZER, quantizer.eval())
    module.register_forward_hook(_quantize_output, prepend=True)


def _quantize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    rounded: Tensor = getattr(module, OUTPUT_QUANTIZER)(output)
    return rounded


def adopt(model: nn.Module, inputs: Any = None) -> nn.Module:
    """A copy of a network that another program quantized, quantized as our networks are, in eval mode.

    `model` itself, without wrappers, if there is nothing to adopt, or not all of its weights' quantizers have adapters.

    In the copy scales are frozen, observers switched off, and parameters have the names they had.  It computes the
    same, which is checked: each layer with a quantizer, on what it gets for `inputs`, must give what the original gave,
    and pass gradients where that does; the weights used must be equal, and so the outputs.

    Args:
        inputs: what the model is called with, on any device, of which some are tried; None for no check.  With them, a
            quantizer at the output of a layer is also known as that of the input of the layers behind (which noise and
            features ask for).

    Raises:
        UserError: if an adapter does not agree with the module that it is for, or does not apply to it; if the network
            was converted for inference, or does not run.
    """
    model = unwrapped(model)
    check_not_converted(model)
    if not any(has_adapter(module) for module in model.modules() if not isinstance(module, GraphModule)):
        return model  # (a graph is one of what is in it)
    theirs = eval_copy(model)
    kinds = {p.dtype for p in theirs.parameters()}
    if kinds & {torch.float16, torch.bfloat16}:
        theirs.float()  # as for every measurement, and ahead of comparing
    for module in theirs.modules():
        for switch in OBSERVERS:
            if isinstance(getattr(module, switch, None), Tensor):
                getattr(module, switch).zero_()
    original: Any = None
    names = [name for name, module in theirs.named_modules() if has_adapter(module)]
    if inputs is not None and torch.float64 in kinds:
        adopt(copy.deepcopy(theirs).float(), inputs)  # to check it: other programs' kernels may know float32 only
    elif inputs is not None:
        original = copy.deepcopy(theirs)
    try:
        ours = _turn(theirs, "", {})
    except UnknownQuantizerError:  # what stands in the way of a measurement is said by `others.py`
        return model
    if any(WEIGHT in name for name, _, _ in other_quantizers(ours)):
        return model
    if inputs is not None:
        parts = split(take(inputs, slice(None, None, -(-size(inputs) // SHOWN))), AT_ONCE)
        for part in parts if original is not None else []:
            check_agreement(original, names, ours, part)
        name_input_quantizers(ours, parts[0])
    return ours


def has_adapter(module: nn.Module) -> bool:
    """Whether an adapter is registered for the module's class, or a base of it."""
    return _find(module) is not None


@cache
def _load(front_end: str) -> None:
    """Register the adapters of a package, unless it is another version of it, that lacks what they are for."""
    with suppress(ImportError):
        importlib.import_module(f"{__package__}.{front_end}")


def _find(module: nn.Module) -> Adapter | None:
    for kind in type(module).__mro__:
        for place, front_end in FRONT_ENDS.items():
            if kind.__module__.startswith(place):
                _load(front_end)
        if kind in _adapters:
            return _adapters[kind]
    return None


def _turn(module: nn.Module, name: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """What takes the module's place, with all inside turned; a module that is in two places stays one."""
    if isinstance(module, Quantizer):
        return module
    if isinstance(module, Forward):
        return Forward(_turn(module.network, name, done), module.function)
    if module not in done:
        adapter = _find(module)
        try:
            done[module] = turned = adapter(module) if adapter else module
        except UnknownQuantizerError:
            raise
        except Exception as error:  # the user's code: anything can happen
            what = error if isinstance(error, UserError) else f"its adapter fails: {type(error).__name__}: {error}"
            raise UserError(f"'{name}' ({type(module).__name__}) cannot be turned into our form: {what}.") from error
        if not isinstance(turned, nn.Module):
            found = f"gives a {type(turned).__name__} for '{name}', and no module"
            raise UserError(f"The adapter of {type(module).__name__} {found}.")
        done[turned] = turned
        for inner, child in list(turned._modules.items()):
            if child is not None:
                setattr(turned, inner, _turn(child, f"{name}.{inner}".lstrip("."), done))
    return done[module]
