"""How a network is called with the inputs of a batch, and which of its outputs counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.errors import UserError, out_of_memory
from fpq_analysis.nests import Nest, by_field, described, device_of
from fpq_analysis.ranks.wrapped import unwrapped
from fpq_analysis.references import find

# (model, inputs) to the outputs.
ForwardFunction = Callable[[nn.Module, Any], Any]
OWN_CALL = (
    ": a mapping is handed over by keyword, a tuple by place, and any other call is a function (model, inputs) to the "
    "outputs, forward=... (--forward)"
)


def call(model: nn.Module, inputs: Nest) -> Any:
    """`model(inputs)`; of a tuple or list its parts, of a mapping its items by keyword."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def output_tensor(outputs: Any) -> Tensor:
    """The tensor that a loss is of: the outputs themselves, their `logits`, or the only tensor in them.

    Raises:
        UserError: if it cannot be told which one that is.
    """
    if isinstance(outputs, Tensor):
        return outputs
    named = _fields(outputs)
    found = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if "logits" in found:
        return found["logits"]
    if len(found) == 1:
        return next(iter(found.values()))
    held = ", ".join(f"{name} ({'x'.join(map(str, t.shape)) or 'a number'})" for name, t in found.items())
    raise UserError(
        f"The model gives a {type(outputs).__name__}, not a tensor, and which field of it the loss takes is not known: "
        + (f"it holds the tensors {held}, none of them named 'logits'. " if found else "it holds no tensor. ")
        + "Give a function (model, inputs) to the outputs: forward=lambda model, inputs: model(inputs)[...], on the "
        "command line --forward package.module:function."
    )


def _fields(outputs: Any) -> dict[str, Any]:
    if isinstance(outputs, Mapping):
        return {str(name): value for name, value in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        names = getattr(outputs, "_fields", range(len(outputs)))
        return {str(name): value for name, value in zip(names, outputs, strict=True)}
    if is_dataclass(outputs) and not isinstance(outputs, type):
        return by_field(outputs)
    return {}


class Forward(nn.Module):
    """A network as everything here calls it: with one argument, the inputs of a batch, to one tensor of outputs.

    Modules, parameters and buffers are the network's own, by their own names: it is no module among them itself.
    """

    network: nn.Module
    function: ForwardFunction | None

    def __init__(self, network: nn.Module, function: ForwardFunction | None = None) -> None:
        super().__init__()
        own: dict[str, Any] = {"network": network, "function": function, "training": network.training}
        for state in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            own[state] = vars(network)[state]
        vars(self).update(own)  # not as a submodule, which would change all names

    def forward(self, inputs: Nest) -> Tensor:
        """Outputs (B, ...) for the inputs of B samples."""
        run = self.function or call
        return output_tensor(run(self.network, inputs))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["network"], name)  # what else the network has

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """Those of the network, itself the first."""
        return self.network.named_modules(*args, **options)

    def train(self, mode: bool = True) -> Forward:
        """As the network's."""
        self.network.train(mode)
        self.training = mode
        return self

    def _apply(self, *args: Any, **options: Any) -> Forward:  # behind `to`, `double`, ...
        self.network._apply(*args, **options)
        return self


def with_forward(model: nn.Module, function: str | ForwardFunction | None = None) -> nn.Module:
    """The model, as everything here calls it; `function` (model, inputs) says how, if not as `call` does.

    A model that is one already stays as it is; wrappers are taken off (`ranks/wrapped.py`).

    Raises:
        UserError: if `function` is none, nor the name `package.module:function` of one; if the model is no module.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        cure = "Give program.module()" if kind == "ExportedProgram" else "Give the network itself"
        raise UserError(f"The model is not an nn.Module (but of the type {kind}), whose layers are needed. {cure}.")
    if isinstance(function, str):
        function = find(function, "forward function")
    if function is not None and not callable(function):
        raise UserError(f"forward is a {type(function).__name__}; give a function (model, inputs) to the outputs.")
    if isinstance(model, (Forward, torch.jit.ScriptModule)):
        return model
    return Forward(unwrapped(model), function)


@contextmanager
def running(inputs: Nest) -> Iterator[None]:
    """Inside, whatever a network raises for these inputs is said in words; where memory runs out excepted.

    Raises:
        UserError: with what it raised, and the shapes and types of the inputs.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the user's code: anything can happen
        if out_of_memory(error):
            raise
        what = str(error).strip().split("\n")[0][:200].rstrip(".")
        raise UserError(
            f"The model cannot be run on these inputs, of {described(inputs)}, on "
            f"{device_of(inputs).type} ({type(error).__name__}: {what}). Check "
            f"their shape and type against what its forward takes{'' if isinstance(inputs, Tensor) else OWN_CALL}."
        ) from error
