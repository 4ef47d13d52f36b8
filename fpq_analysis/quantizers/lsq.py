"""LSQ: Learned Step Size Quantization (Esser et al. 2020, arXiv:1902.08153), in the asymmetric form of FPQ Eq. 3-6.

Differences from the LSQ paper, all FPQ's: the grid is asymmetric with a fixed zero point, weights have a step size for
each output channel, and first values come from calibration images rather than from 2 mean|x| / sqrt(Qp).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fpq_analysis.quantizers.base import MIN_STEP, Quantizer
from fpq_analysis.quantizers.calibration import CALIBRATIONS
from fpq_analysis.quantizers.fake_quantize import FusedFakeQuantize, fake_quantize, scale_gradient


class LSQ(Quantizer):
    """Quantizer with a learnable step size (Esser et al. 2020, arXiv:1902.08153), asymmetric as in FPQ's Eq. 3-6.

    Args:
        bits: 2 to 16.
        rows: of a weight, the number of its output channels, which have a step size each; None: one for all.
        ndim: of a weight, the number of its axes.
    """

    def __init__(self, bits: int, rows: int | None = None, ndim: int = 4) -> None:
        super().__init__(bits)
        shape = () if rows is None else (rows,) + (1,) * (ndim - 1)
        self.step_size: nn.Parameter = nn.Parameter(torch.full(shape, math.nan))
        self.register_buffer("zero_point", torch.zeros(shape))

    def quantize(self, x: Tensor) -> Tensor:
        """Learned step size, fixed zero point; gradients as in `fake_quantize`."""
        s: Tensor = self.step_size
        if self.training:
            s = scale_gradient(s, self.gradient_scale(x))
        if s.ndim == 0 and (self.fused or not (s.requires_grad and torch.is_grad_enabled())):
            return FusedFakeQuantize.apply(x, s, self.zero_point, self.levels)
        return fake_quantize(x, s, self.zero_point, self.levels)

    def gradient_scale(self, x: Tensor) -> float:
        """LSQ's 1 / sqrt(M Qp), M the number of values that share a step size.

        For activations M counts the features of one image, as the LSQ paper does; many repositories count the batch
        too, which makes the pace of the step size depend on the batch size.  Only in training: curvature with respect
        to the step size wants the plain derivative.
        """
        rows = self.step_size.numel()
        values = x.numel() / rows if self.step_size.ndim else x[0].numel()
        return 1 / math.sqrt(values * self.levels)

    @torch.no_grad()
    def calibrate(self, x: Tensor, how: str) -> None:
        """FPQ Eq. 4-5, or the search for the least squared error."""
        step, zero = CALIBRATIONS[how](self._rows(x), self.bits)
        self.step_size.copy_(step.view_as(self.step_size).clamp_(min=MIN_STEP))
        self.zero_point.copy_(zero.view_as(self.zero_point))

    def _rows(self, x: Tensor) -> Tensor:
        """(step sizes, values): the values that share a step size in one row."""
        return x.detach().float().reshape(self.step_size.numel(), -1)

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Where k = round(x/s) + z is below 0 or above 2^bits - 1."""
        q = (x / self.step_size).round() + self.zero_point
        return (q < 0) | (q > self.levels)

    def scales(self) -> list[nn.Parameter]:
        return [self.step_size]
