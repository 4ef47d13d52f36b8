"""Which quantizer at the output of a layer is the one whose values come in at the next."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _MaxPoolNd

from fpq_analysis.quantizers.adapters.agreement import fitted
from fpq_analysis.quantizers.apply import INPUT_QUANTIZER, QUANTIZABLE, quantizers
from fpq_analysis.quantizers.base import Quantizer

# What puts out values that came in: they stay on the grid.
PASSED_ON = (nn.Identity, nn.Flatten, _DropoutNd, _MaxPoolNd)


@torch.no_grad()
def name_input_quantizers(model: nn.Module, inputs: Any) -> None:
    """Enter the quantizer of what a layer takes as the layer's `input_quantizer`, where it has none of its own.

    It is not called there a second time.  Values are followed by the identity of their tensor, so that what the forward
    pass does between two layers by itself (a sum, a functional pooling) ends the trail.
    """
    source: dict[int, Quantizer] = {}
    alive: list[Any] = []  # so that no tensor gets the identity of another
    taken: dict[nn.Module, set[Quantizer | None]] = {}

    def rounds(module: Quantizer, args: Any, output: Tensor) -> None:
        alive.append(output)
        source[id(output)] = module

    def passes(module: nn.Module, args: Any, output: Tensor) -> None:
        if args and id(args[0]) in source:
            alive.append(output)
            source[id(output)] = source[id(args[0])]

    def takes(module: nn.Module, args: Any) -> None:
        taken.setdefault(module, set()).add(source.get(id(args[0])) if args else None)

    with ExitStack() as hooks:
        for _, quantizer, is_weight in quantizers(model):
            if not is_weight:
                hooks.enter_context(quantizer.register_forward_hook(rounds))
        for module in model.modules():
            if isinstance(module, PASSED_ON):
                hooks.enter_context(module.register_forward_hook(passes))
            elif isinstance(module, QUANTIZABLE) and not hasattr(module, INPUT_QUANTIZER):
                hooks.enter_context(module.register_forward_pre_hook(takes))
        model(fitted(inputs, model))
    for layer, found in taken.items():
        one = found.pop()
        if one is not None and not found:
            layer.register_module(INPUT_QUANTIZER, one)
