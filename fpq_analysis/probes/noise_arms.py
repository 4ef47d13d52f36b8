"""Noise of the size of rounding, in features or weights, for gradients taken under it.

It depends on the seed, the draw and the sample alone: not on micro-batches, memory or device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fpq_analysis.probes.subject import Subject
from fpq_analysis.quantizers import FeatureNoise, Quantizer, WeightNoise
from fpq_analysis.quantizers.noise import uniform_rows


class ArmNoise(Protocol):
    """What an arm does to the forward pass; a context manager."""

    n_draws: int

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...

    def draw(self, index: int) -> None:
        """Use the noise of this draw from now on."""

    def see(self, samples: Tensor) -> None:
        """The next forward pass is over these samples."""


class NoNoise:
    """The clean arm."""

    n_draws = 1

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def draw(self, index: int) -> None: ...

    def see(self, samples: Tensor) -> None: ...


class NoiseInFeatures(FeatureNoise):
    """FPQ Eq. 9 at every convolution, from a generator for each draw and sample."""

    def __init__(self, view: nn.Module, n_draws: int, n_data: int, seed: int) -> None:
        super().__init__(view, torch.Generator())
        self.n_draws = n_draws
        self.seeds = torch.randint(2**31, (n_draws, n_data), generator=torch.Generator().manual_seed(seed))
        self.draw(0)

    def draw(self, index: int) -> None:
        self.index = index

    def see(self, samples: Tensor) -> None:
        self.generators = [torch.Generator().manual_seed(s) for s in self.seeds[self.index, samples].tolist()]

    def add(self, x: Tensor, quantizer: Quantizer) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        size = x.numel() // len(self.generators)
        noise = torch.empty_like(x).copy_(uniform_rows(self.generators, size).view(x.shape).sub_(0.5))
        return x + noise.mul_(self.size * quantizer.step_size.detach())


class _Offset(nn.Module):
    """A parametrization: the weight with noise on it."""

    noise: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.noise is None else weight + self.noise


class NoiseInWeights:
    """The same on the weights.

    `WeightNoise` sits on the quantizers, which the dequantized view no longer has, so here the noise is a
    parametrization of the view's own: on plain weights Q(w), or behind the quantizer of latent ones.
    """

    def __init__(self, model: nn.Module, view: nn.Module, n_draws: int, seed: int) -> None:
        self.n_draws = n_draws
        self.seeds = torch.randint(2**31, (n_draws,), generator=torch.Generator().manual_seed(seed)).tolist()
        noise = WeightNoise(model, torch.Generator())
        names = {id(layer): name for name, layer in model.named_modules()}
        layers = dict(view.named_modules())
        self.sites = [(layers[names[id(layer)]], quantizer) for layer, quantizer in noise.sites]
        self.size = noise.size
        self.offsets = [_Offset() for _ in self.sites]

    def __enter__(self) -> None:
        for (layer, _), offset in zip(self.sites, self.offsets, strict=True):
            parametrize.register_parametrization(layer, "weight", offset, unsafe=True)

    def __exit__(self, *_: object) -> None:
        for offset in self.offsets:
            offset.noise = None

    def draw(self, index: int) -> None:
        generator = torch.Generator().manual_seed(self.seeds[index])
        for (layer, quantizer), offset in zip(self.sites, self.offsets, strict=True):
            weight = layer.weight.detach()
            uniform = (torch.rand(weight.shape, generator=generator, dtype=torch.float32) - 0.5).to(weight)
            offset.noise = uniform * (self.size * quantizer.step_size.detach().to(weight))

    def see(self, samples: Tensor) -> None: ...


def noise_arms(model: nn.Module, subject: Subject, n_draws: int, seed: int) -> Iterator[tuple[str, ArmNoise]]:
    """The arms in noise that the model has quantizers for, by name."""
    features = NoiseInFeatures(subject.view, max(2, n_draws // 4), subject.n_data, seed)
    if features.sites:
        yield "features", features
    weights = NoiseInWeights(model, subject.view, n_draws, seed)
    if weights.sites:
        yield "weights", weights
