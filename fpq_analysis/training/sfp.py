"""Stochastic Feature Perturbation: FPQ Eq. 9 and 14 (Pang & Cai 2025, arXiv:2503.11159).

At the input of convolution l, behind its quantizer, add noise drawn element-wise from U[-s_l/2, s_l/2], s_l the input's
step size, with probability p a convolution and step (`quantizers/noise.py` says where).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.data import epoch_generator
from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.models import model_device
from fpq_analysis.quantizers import FeatureNoise
from fpq_analysis.ranks import place
from fpq_analysis.training.config import TrainConfig
from fpq_analysis.training.regularizer import Regularizer
from fpq_analysis.training.weight_noise import check_steps


class StochasticFeaturePerturbation(FeatureNoise):
    """FPQ's noise of the size of rounding, for any training loop (arXiv:2503.11159, Eq. 9 and 14).

    A context manager: inside, every forward pass in training mode adds noise from U[-s/2, s/2] to the inputs of the
    convolutions, s an input's step size, at each with probability `p`.  The noise has generators of its own, and the
    global random state is left alone::

        with StochasticFeaturePerturbation(model, p=0.1):
            train_one_epoch(model)

    Args:
        model: a network with fake-quantized inputs, on the device that it is trained on.
        p: probability of noise at each convolution and step; the paper has 0.1.
        gate_generator: CPU generator of the on/off draws, so that they never wait for a device; None: by `seed`.
        noise_generator: generator on the model's device; None: by `seed`.
        site: `after` or `before` the quantizer; the latter makes it stochastic rounding.
        seed: of those generators that are not given.
        step_sizes: for quantizers that are not of this package: name of each layer that gets noise to the step size of
            its input, a scalar tensor or a function that gives it as it is then.

    Raises:
        UserError: if nothing would get noise, or for a layer that does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        p: float = 0.1,
        gate_generator: torch.Generator | None = None,
        noise_generator: torch.Generator | None = None,
        site: str = "after",
        *,
        seed: int = 0,
        step_sizes: Mapping[str, Tensor | Callable[[], Tensor]] | None = None,
    ) -> None:
        if not 0 <= p <= 1:
            raise UserError(f"p is {p}; it is the probability of noise, from 0 to 1.")
        if site not in ("after", "before") or (site == "before" and step_sizes is not None):
            raise UserError(
                f"The noise cannot be at '{site}': it is after the quantizer, or before one of this package."
            )
        super().__init__(model, noise_generator or torch.Generator(model_device(model)).manual_seed(seed), site=site)
        self.p = p
        self.gate_generator = gate_generator or torch.Generator().manual_seed(seed)
        if step_sizes is not None:
            self.sites = _sites(model, step_sizes)
        if not self.sites:
            raise UserError(
                "No convolution of this network has an input quantized by this package, so nothing would get noise. "
                "Quantize it first (fpq_analysis.quantize), or name the layers and what their inputs' steps are: "
                "step_sizes={'conv1': lambda: model.conv1_input.scale, ...}."
            )

    def is_on(self, module: nn.Module) -> bool:
        """One draw a convolution and step, whatever the mode, so that the stream does not depend on it."""
        on = torch.rand((), generator=self.gate_generator).item() < self.p
        return on and module.training


@dataclass(frozen=True)
class _Step:
    """Stands for the quantizer of another package: all that noise asks of it."""

    value: Tensor | Callable[[], Tensor]

    @property
    def step_size(self) -> Tensor:
        return self.value if isinstance(self.value, Tensor) else self.value()


def _sites(model: nn.Module, step_sizes: Mapping[str, Tensor | Callable[[], Tensor]]) -> list[tuple[nn.Module, Any]]:
    layers = dict(model.named_modules())
    for name in step_sizes:
        if name not in layers:
            raise UserError(
                f"The network has no layer '{name}'{did_you_mean(name, layers)}, for which a step is given."
            )
    return [(layers[name], _Step(value)) for name, value in step_sizes.items()]


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
        noise = self.generator(epoch, f"sfp noise{place() or ''}")  # other images, other noise
        p = 1.0 if self.weight is None else self.config.sfp_p
        return StochasticFeaturePerturbation(self.model, p, gates, noise, self.config.sfp_site)


class NoisyFeatures(SFP):
    """Noise at every convolution and step: the feature arm of FPQ's Figure 2."""

    weight = None
