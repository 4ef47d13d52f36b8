"""Stochastic Feature Perturbation: FPQ Eq. 9 and 14 (Pang & Cai 2025, arXiv:2503.11159).

At the input of convolution l, behind its quantizer, add noise drawn element-wise from U[-s_l/2, s_l/2], s_l the input's
step size, with probability p a convolution and step.  The classifier gets none, and neither does a convolution whose
input is not quantized, for want of a step size.  `site="before"` puts the noise in front of the quantizer, which
makes it stochastic rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.quantizers import Quantizer, quantizers
from fpq_analysis.quantizers.apply import CONVOLUTIONS

SITES = ("after", "before")


class StochasticFeaturePerturbation:
    """Context manager: inside, forward passes in training mode are perturbed.

    Args:
        model: a quantized model.
        p: probability of noise at each convolution.
        gate_generator: CPU generator of the on/off draws, so that they never wait for a device.
        noise_generator: generator on the model's device.
        site: `after` or `before` the quantizer.
    """

    def __init__(
        self,
        model: nn.Module,
        p: float,
        gate_generator: torch.Generator,
        noise_generator: torch.Generator,
        site: str = "after",
    ) -> None:
        layers = dict(model.named_modules())
        self.sites = [
            (layers[name], quantizer)
            for name, quantizer, is_weight in quantizers(model)
            if not is_weight and isinstance(layers[name], CONVOLUTIONS)
        ]
        self.p = p
        self.site = site
        self.gate_generator = gate_generator
        self.noise_generator = noise_generator
        self.handles: list[Any] = []

    def __enter__(self) -> StochasticFeaturePerturbation:
        # Hooks run in the order of registration, so those on a layer see what the quantizer's hook there gives.
        for layer, quantizer in self.sites:
            module = layer if self.site == "after" else quantizer
            self.handles.append(module.register_forward_pre_hook(self._hook(quantizer)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _hook(self, quantizer: Quantizer) -> Any:
        def perturb(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            # One draw a convolution and step, whatever the mode, so that the stream does not depend on it.
            on = torch.rand((), generator=self.gate_generator).item() < self.p
            if not (on and module.training):
                return None
            x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))  # half precision is too coarse
            noise = torch.empty_like(x).uniform_(-0.5, 0.5, generator=self.noise_generator)
            return (x + noise.mul_(quantizer.step_size.detach()), *args[1:])

        return perturb
