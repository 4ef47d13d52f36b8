"""LSQ+: a learnable offset for activations, symmetric weights (Bhalgat et al. 2020, arXiv:2004.09576).

Activations are LSQ on x - b with the offset b learned beside the step size; weights are LSQ on a symmetric grid.  Both
start as the paper says: activations from the least squared error, weights from their mean and standard deviation.

Departures: (1) rounding comes before clipping, as everywhere here (FPQ Eq. 3): equal values, and a derivative that
reaches half a step further.  (2) The offset's gradient has the step size's factor 1 / sqrt(M Qp), on which the paper is
silent.  (3) Weights have a step size for each output channel, which is FPQ's protocol for every method.

The offset is no whole number of steps, so zero is in general not on the grid of activations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpq_analysis.quantizers.base import MIN_STEP
from fpq_analysis.quantizers.calibration import CALIBRATIONS, least_squares
from fpq_analysis.quantizers.fake_quantize import scale_gradient
from fpq_analysis.quantizers.lsq import LSQ


class LSQPlus(LSQ):
    """clip(round((x - b) / s), 0, 2^bits - 1) s + b for a whole activation, s and b learned (arXiv:2004.09576).

    The derivative in b is 0 in range and 1 outside; those in x and s are LSQ's at x - b.  State: `step_size` and
    `offset` of shape (); `zero_point`, that of x - b, is always zero.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.offset = nn.Parameter(torch.zeros(()))

    def quantize(self, x: Tensor) -> Tensor:
        b: Tensor = self.offset
        if self.training:
            b = scale_gradient(b, self.gradient_scale(x))
        return super().quantize(x - b) + b

    @torch.no_grad()
    def calibrate(self, x: Tensor, how: str) -> None:
        """`how`, then for `mse` the best s and b without the condition that zero be on the grid."""
        values = self._rows(x)
        step, zero = CALIBRATIONS[how](values, self.bits)
        offset = -zero * step
        if how == "mse":
            step, offset = least_squares(values, step, offset, self.levels)
        self.step_size.copy_(step[0].clamp(min=MIN_STEP))
        self.offset.copy_(offset[0])

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Where round((x - b) / s) is below 0 or above 2^bits - 1."""
        return super().clipped(x - self.offset)

    @torch.no_grad()
    def position(self, x: Tensor) -> Tensor:
        return super().position(x - self.offset)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The whole number k each value of `x` is stored as, int32, shape of x."""
        return ((self(x) - self.offset) / self.step_size).round().int()


class SymmetricLSQ(LSQ):
    """`LSQ` on the levels -2^(bits-1) .. 2^(bits-1) - 1 of a weight: the zero point is always 2^(bits-1)."""

    @torch.no_grad()
    def calibrate(self, x: Tensor, how: str) -> None:
        """From mean m and standard deviation d, `max(|m - 3d|, |m + 3d|) / 2^(bits-1)`; `how` has no part in it."""
        values = self._rows(x)
        reach = values.mean(1).abs() + 3 * values.std(1, correction=0)
        step = torch.where(reach > 0, reach / 2 ** (self.bits - 1), 1.0)  # any step represents a row of zeros
        self.step_size.copy_(step.view_as(self.step_size).clamp_(min=MIN_STEP))
        self.zero_point.fill_(2 ** (self.bits - 1))
