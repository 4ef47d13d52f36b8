"""Which place in a network a name stands for: a module's output, or its input; and how to capture its values."""

from __future__ import annotations

import difflib
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.errors import UserError
from fpq_analysis.forward import running
from fpq_analysis.nests import Nest
from fpq_analysis.quantizers import Quantizer
from fpq_analysis.quantizers.apply import INPUT_QUANTIZER, QUANTIZABLE

AUTO = "auto"
OF_INPUT = ":input"
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)


@dataclass(frozen=True)
class Site:
    """A place in a network whose values can be had.

    Attributes:
        quantizer: of the layers that take the values as they are, if it is one.
    """

    name: str
    module: nn.Module
    of_input: bool
    quantizer: Quantizer | None

    def values(self, model: nn.Module, x: Nest) -> Tensor:
        """(N, C, places), a copy of the values, as what comes behind may work in place."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
            found.append((output or args)[0].detach().clone())

        if self.of_input:  # in front of the quantizer's own hook
            handle = self.module.register_forward_pre_hook(keep, prepend=True)
        else:
            handle = self.module.register_forward_hook(keep)
        with handle:
            model(x)
        return by_channel(found[0])


def by_channel(x: Tensor) -> Tensor:
    """(N, C, ...) as (N, C, places)."""
    return x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)


def wide(x: Tensor) -> Tensor:
    """In float64, for sums; on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def find_site(model: nn.Module, layer: str, x: Nest) -> Site:
    """The place that `layer` names, from one forward pass over `x`.

    Raises:
        UserError: if there is no such layer, or it does not put out one (N, C, ...) tensor a pass.
    """
    modules = dict(model.named_modules())
    passed = _Pass(model, x)
    name, of_input = passed.middle() if layer == AUTO else (layer.removesuffix(OF_INPUT), layer.endswith(OF_INPUT))
    if name not in modules:
        near = difflib.get_close_matches(name, [known for known in modules if known], n=3, cutoff=0.3)
        raise UserError(
            f"The network has no layer '{name}'." + (f" The nearest names: {', '.join(near)}." if near else "") + " "
            "Names are those of model.named_modules(); with ':input' behind, what goes into that layer; 'auto' for one "
            "in the middle."
        )
    full = name + OF_INPUT if of_input else name
    calls = [call for call in (passed.inputs if of_input else passed.outputs) if call.name == name]
    if len(calls) != 1:
        takers = [taker + OF_INPUT for call in calls for taker in passed.takers(call)]
        raise UserError(
            f"'{name}' is called {len(calls)} times in a forward pass, and a layer here is what comes out of one call. "
            "Name the layer that takes the values you mean" + (f": {', '.join(takers)}." if takers else ", NAME:input.")
        )
    (call,) = calls
    if not isinstance(call.value, Tensor) or call.value.ndim < 2:
        raise UserError(f"'{full}' is no tensor of shape (N, C, ...), so it has no channels. Name another layer.")
    takers = [name] if of_input else passed.takers(call)
    found = {getattr(modules[taker], INPUT_QUANTIZER, None) for taker in takers}
    quantizer = found.pop() if len(found) == 1 else None
    of_all = isinstance(quantizer, Quantizer) and quantizer.step_size.numel() == 1  # not of each channel, or token
    return Site(full, modules[name], of_input, quantizer if of_all else None)


@dataclass(frozen=True)
class _Call:
    """What went into, or came out of, one call of a module; `version` counts the changes made to it in place."""

    name: str
    value: Any
    version: int


class _Pass:
    """One forward pass: what every module took and put out, in the order of execution."""

    def __init__(self, model: nn.Module, x: Nest) -> None:
        self.modules = dict(model.named_modules())
        self.inputs: list[_Call] = []
        self.outputs: list[_Call] = []
        with ExitStack() as hooks, torch.no_grad():
            for name, module in self.modules.items():
                before = module.register_forward_pre_hook(self._note(name, self.inputs), prepend=True)
                hooks.enter_context(before)
                hooks.enter_context(module.register_forward_hook(self._note(name, self.outputs)))
            with running(x):
                model(x)

    def _note(self, name: str, calls: list[_Call]) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
            value = output[0] if output else next(iter(args), None)
            calls.append(_Call(name, value, value._version if isinstance(value, Tensor) else 0))

        return note

    def takers(self, call: _Call) -> list[str]:
        """The convolution and linear layers that take these very values: the same tensor, not changed since."""
        return [
            taken.name
            for taken in self.inputs
            if taken.value is call.value
            and taken.version == call.version
            and isinstance(self.modules[taken.name], QUANTIZABLE)
        ]

    def middle(self) -> tuple[str, bool]:
        """A name for `auto`, and whether it is its input that is meant."""
        calls = Counter(call.name for call in self.outputs)
        once = [call for call in self.outputs if calls[call.name] == 1]
        chosen = [
            call.name
            for call in once
            if isinstance(self.modules[call.name], ACTIVATIONS) and len(self.takers(call)) == 1
        ]
        layers = [call.name for call in once if isinstance(self.modules[call.name], QUANTIZABLE)]
        if not chosen and not layers:
            raise UserError(
                "The network has no convolution or linear layer for 'auto' to choose; name a layer (--layer)."
            )
        return (chosen[len(chosen) // 2], False) if chosen else (layers[len(layers) // 2], True)
