"""LSQ: Learned Step Size Quantization (Esser et al. 2020, arXiv:1902.08153), in the asymmetric form of FPQ Eq. 3-6.

Differences from the LSQ paper, all FPQ's: the grid is asymmetric with a fixed zero point, weights have a step size for
each output channel, and first values come from calibration images rather than from 2 mean|x| / sqrt(Qp).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fpq_analysis.quantizers.calibration import CALIBRATIONS
from fpq_analysis.quantizers.fake_quantize import FusedFakeQuantize, fake_quantize, scale_gradient

# Step sizes are kept at or above this after every optimiser step: a negative one would mirror the grid.
MIN_STEP = 1e-6


class LSQ(nn.Module):
    """Quantizer with a learnable step size: one for a whole activation, or one for each row of a weight.

    State (all of it in the state dict): `step_size` and `zero_point`, of shape () or (rows, 1, ..., 1).  Until
    `calibrate` is called or a state is loaded, the step size is NaN, so that a forgotten calibration is loud and a
    loaded one is never overwritten.

    Attributes:
        elementwise: each output depends on the input at the same place only (what the latent Hessian's mask needs).
        fused: use the once-differentiable fast form (set by the trainer; activations only).
        observing: None, or the calibration to run on the next input.
    """

    elementwise = True

    def __init__(self, bits: int, rows: int | None = None, ndim: int = 4) -> None:
        super().__init__()
        self.bits = bits
        self.levels = 2**bits - 1
        self.fused = False
        self.observing: str | None = None
        shape = () if rows is None else (rows,) + (1,) * (ndim - 1)
        self.step_size = nn.Parameter(torch.full(shape, math.nan))
        self.zero_point: Tensor
        self.register_buffer("zero_point", torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize: the same shape, on the grid (k - z) s."""
        if self.observing is not None:
            self.calibrate(x, self.observing)
        # Half-precision activations carry too few digits for x/s; the layer that follows casts back by itself.
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        s: Tensor = self.step_size
        if self.training:
            s = scale_gradient(s, self.gradient_scale(x))
        if self.fused and s.ndim == 0:
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
        """Set step size and zero point from `x` by `how`, a key of `calibration.CALIBRATIONS`."""
        rows = x.detach().float().reshape(self.step_size.numel(), -1)
        step, zero = CALIBRATIONS[how](rows, self.bits)
        self.step_size.copy_(step.view_as(self.step_size).clamp_(min=MIN_STEP))
        self.zero_point.copy_(zero.view_as(self.zero_point))

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Boolean mask, shape of x: which values fall outside the grid's range (and so get no gradient)."""
        q = (x / self.step_size).round() + self.zero_point
        return (q < 0) | (q > self.levels)

    @torch.no_grad()
    def project_(self) -> None:
        """Keep the step size positive."""
        self.step_size.clamp_(min=MIN_STEP)

    def extra_repr(self) -> str:
        """Bits and number of step sizes."""
        return f"bits={self.bits}, step_sizes={self.step_size.numel()}"
