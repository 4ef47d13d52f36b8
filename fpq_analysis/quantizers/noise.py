"""Noise of the size of rounding: U[-s/2, s/2], s the step size (FPQ Eq. 9), in the features or in the weights.

Features: at the input of every convolution, behind its quantizer.  Weights: on the quantized weights of every
convolution.  The classifier gets none, and neither does a convolution whose input (or weight) is not quantized, as it
has no step size.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from fpq_analysis.quantizers.apply import CONVOLUTIONS, INPUT_QUANTIZER, weight_quantizers
from fpq_analysis.quantizers.base import Quantizer


def uniform_rows(generators: list[torch.Generator], n: int) -> Tensor:
    """(B, n) float32 in [0, 1), each row from its own generator, on the CPU: a sample's noise is its own."""
    uniform = torch.empty(len(generators), n, dtype=torch.float32)
    for row, generator in zip(uniform, generators, strict=True):
        torch.rand(n, generator=generator, out=row)
    return uniform


class Noise:
    """Context manager: inside, forward passes of this network are perturbed, with noise drawn anew in each.

    Those of a copy are not, and draw nothing, though a deep copy has the hooks too: what is measured on one leaves the
    stream of the noise as it was.

    Args:
        model: a quantized model.
        generator: of the noise, on the model's device.
        of_weights: whether the sites are the weights, or else the inputs, of the convolutions.
        size: width of the noise in steps.

    Attributes:
        sites: (convolution, its quantizer) where noise is added, in the order of the model's modules.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator, of_weights: bool, size: float = 1.0) -> None:
        layers = dict(model.named_modules())
        found: dict[str, Any] = {name: getattr(layer, INPUT_QUANTIZER, None) for name, layer in layers.items()}
        if of_weights:
            found = {name: quantizer for name, (quantizer, _) in weight_quantizers(model).items()}
        self.sites = [
            (layers[name], quantizer)
            for name, quantizer in found.items()
            if isinstance(quantizer, Quantizer) and isinstance(layers[name], CONVOLUTIONS)
        ]
        self.generator = generator
        self.size = size
        self.handles: list[Any] = []

    def attach(self, layer: nn.Module, quantizer: Quantizer) -> Any:
        """Register the hook of one site; returns its handle."""
        raise NotImplementedError

    def is_on(self, module: nn.Module) -> bool:
        """Whether the hooked module is perturbed in this pass."""
        return True

    def add(self, x: Tensor, quantizer: Quantizer) -> Tensor:
        """`x` with noise."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision is too coarse
        noise = torch.empty_like(x).uniform_(-self.size / 2, self.size / 2, generator=self.generator)
        return x + noise.mul_(quantizer.step_size.detach())

    def __enter__(self) -> Self:
        self.handles += [self.attach(layer, quantizer) for layer, quantizer in self.sites]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class FeatureNoise(Noise):
    """Noise U[-s/2, s/2], s the step size, in the input of every convolution (arXiv:2503.11159, Eq. 9).

    Args:
        model: a network with quantized inputs.
        generator: of the noise, on the model's device.
        size: of the noise, in multiples of this.
        site: `after` the input's quantizer, or `before` it, which makes it stochastic rounding.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator, size: float = 1.0, site: str = "after") -> None:
        super().__init__(model, generator, of_weights=False, size=size)
        self.site = site

    def attach(self, layer: nn.Module, quantizer: Quantizer) -> Any:
        """A hook on the layer, behind the quantizer's own there, or on the quantizer."""

        def perturb(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            on = module is place and self.is_on(module)
            return (self.add(args[0], quantizer), *args[1:]) if on else None

        # Hooks run in the order of registration, so those on a layer see what the quantizer's hook there gives.
        place = layer if self.site == "after" else quantizer
        return place.register_forward_pre_hook(perturb)


class WeightNoise(Noise):
    """Noise U[-s/2, s/2] on the quantized weight of every convolution; arguments as for `FeatureNoise`."""

    def __init__(self, model: nn.Module, generator: torch.Generator, size: float = 1.0) -> None:
        super().__init__(model, generator, of_weights=True, size=size)

    def attach(self, layer: nn.Module, quantizer: Quantizer) -> Any:
        def perturb(module: nn.Module, args: Any, weight: Tensor) -> Tensor:
            return self.add(weight, quantizer) if module is quantizer and self.is_on(module) else weight

        return quantizer.register_forward_hook(perturb)
