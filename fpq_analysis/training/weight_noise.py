"""Noise in the weights, the other arm of FPQ's Figure 2: U[-s/2, s/2] on the quantized weights of every convolution.

Figure 2 compares the gradient norm of training with noise in the features (`sfp.py` at p = 1) and in the weights.  The
paper does not say how large the latter is; half a step either way is the noise of rounding, as for features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.quantizers import Quantizer, quantizers
from fpq_analysis.quantizers.apply import CONVOLUTIONS


class WeightPerturbation:
    """Context manager: inside, forward passes in training mode use perturbed weights, drawn anew each time.

    Args:
        model: a quantized model; the classifier gets no noise, as with features.
        generator: on the model's device.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        layers = dict(model.named_modules())
        self.sites = [
            q for name, q, is_weight in quantizers(model) if is_weight and isinstance(layers[name], CONVOLUTIONS)
        ]
        self.generator = generator
        self.handles: list[Any] = []

    def __enter__(self) -> WeightPerturbation:
        for quantizer in self.sites:
            self.handles.append(quantizer.register_forward_hook(self._perturb))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _perturb(self, quantizer: Quantizer, args: Any, weight: Tensor) -> Tensor:
        if not quantizer.training:
            return weight
        noise = torch.empty_like(weight).uniform_(-0.5, 0.5, generator=self.generator)
        return weight + noise.mul_(quantizer.step_size.detach())
