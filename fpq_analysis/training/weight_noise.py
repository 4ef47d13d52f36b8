"""Noise in the weights, the other arm of FPQ's Figure 2: U[-s/2, s/2] on the quantized weights of every convolution.

Figure 2 compares the gradient norm of training with noise in the features (`sfp.py` at p = 1) and in the weights.  The
paper does not say how large the latter is; half a step either way is the noise of rounding, as for features.
"""

from __future__ import annotations

from torch import nn

from fpq_analysis.quantizers import WeightNoise


class WeightPerturbation(WeightNoise):
    """Context manager: inside, forward passes in training mode use perturbed weights, drawn anew each time."""

    def is_on(self, module: nn.Module) -> bool:
        """In training mode."""
        return module.training
