"""Stochastic Feature Perturbation: FPQ Eq. 9 and 14 (Pang & Cai 2025, arXiv:2503.11159).

At the input of convolution l, behind its quantizer, add noise drawn element-wise from U[-s_l/2, s_l/2], s_l the input's
step size, with probability p a convolution and step (`quantizers/noise.py` says where).
"""

from __future__ import annotations

import torch
from torch import nn

from fpq_analysis.data import epoch_generator
from fpq_analysis.quantizers import FeatureNoise
from fpq_analysis.training.config import TrainConfig
from fpq_analysis.training.regularizer import Regularizer
from fpq_analysis.training.weight_noise import check_steps


class StochasticFeaturePerturbation(FeatureNoise):
    """Context manager: inside, forward passes in training mode are perturbed.

    Args:
        model: a quantized model.
        p: probability of noise at each convolution.
        gate_generator: CPU generator of the on/off draws, so that they never wait for a device.
        noise_generator: generator on the model's device.
        site: `after` or `before` the quantizer; the latter makes it stochastic rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        p: float,
        gate_generator: torch.Generator,
        noise_generator: torch.Generator,
        site: str = "after",
    ) -> None:
        super().__init__(model, noise_generator, site=site)
        self.p = p
        self.gate_generator = gate_generator

    def is_on(self, module: nn.Module) -> bool:
        """One draw a convolution and step, whatever the mode, so that the stream does not depend on it."""
        on = torch.rand((), generator=self.gate_generator).item() < self.p
        return on and module.training


class SFP(Regularizer):
    """FPQ's, with probability `sfp_p`."""

    weight: str | None = "sfp_p"

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """The inputs have steps, where they get noise."""
        if cls.weight is None or config.sfp_p > 0:
            check_steps(config, "features")

    def during(self, epoch: int) -> StochasticFeaturePerturbation:
        gates = epoch_generator(self.config.seed, epoch, "sfp gates")
        noise = self.generator(epoch, "sfp noise")
        p = 1.0 if self.weight is None else self.config.sfp_p
        return StochasticFeaturePerturbation(self.model, p, gates, noise, self.config.sfp_site)


class NoisyFeatures(SFP):
    """Noise at every convolution and step: the feature arm of FPQ's Figure 2."""

    weight = None
