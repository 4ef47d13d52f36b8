"""Noise in the weights, the other arm of FPQ's Figure 2: U[-s/2, s/2] on the quantized weights of every convolution.

Figure 2 compares the gradient norm of training with noise in the features (`sfp.py` at p = 1) and in the weights.  The
paper does not say how large the latter is; half a step either way is the noise of rounding, as for features.
"""

from __future__ import annotations

from torch import nn

from fpq_analysis.errors import UserError
from fpq_analysis.quantizers import WeightNoise
from fpq_analysis.quantspec import FLOAT_BITS
from fpq_analysis.training.config import TrainConfig
from fpq_analysis.training.regularizer import Regularizer


class WeightPerturbation(WeightNoise):
    """Context manager: inside, forward passes in training mode use perturbed weights, drawn anew each time."""

    def is_on(self, module: nn.Module) -> bool:
        return module.training


class NoisyWeights(Regularizer):
    """Noise in every convolution's weights, in every step."""

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        check_steps(config, "weights")

    def during(self, epoch: int) -> WeightPerturbation:
        return WeightPerturbation(self.model, self.generator(epoch, "weight noise"))


def check_steps(config: TrainConfig, noisy: str) -> None:
    """Raise `UserError` if what gets the noise, `features` or `weights`, is not quantized."""
    assert config.spec is not None  # it is a quantized method
    bits = config.spec.act_bits if noisy == "features" else config.spec.weight_bits
    if bits == FLOAT_BITS:
        alone = ", or leave the noise out: --sfp-p 0" if config.method == "fpq" else ""
        raise UserError(
            f"'{config.method}' adds noise of half a quantization step to the {noisy}, which {config.bits} leaves "
            f"in floating point, without steps. Quantize both, as in W4A4{alone}."
        )
