"""PACT: a learnable clipping level for activations (Choi et al. 2018, arXiv:1805.06085).

Weights are DoReFa's (Zhou et al. 2016, arXiv:1606.06160), with which the PACT paper pairs it.

Departures: (1) The clipping level starts from the calibration images, as the step sizes of the other methods do; the
paper starts at a constant.  (2) An input with negative values (the image; MobileNetV2's linear bottlenecks), for which
the paper has no formula, is clipped to [-alpha, alpha] on a grid that holds zero, so of one level less.  (3) DoReFa's
weights lie in [-1, 1] whatever their size was; a fixed factor for each layer, of least squared error at the start,
gives the size back.  Without it the student would not start as its trained teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fpq_analysis.methods import MethodSettings
from fpq_analysis.quantizers.base import MIN_STEP, Quantizer
from fpq_analysis.quantizers.calibration import CALIBRATIONS
from fpq_analysis.quantizers.fake_quantize import round_straight_through


class PACT(Quantizer):
    """round(y / s) s with y = clip(x, 0, alpha), s = alpha / levels, for a whole activation; alpha is learned.

    Choi et al. 2018, arXiv:1805.06085.  Derivatives, without any factor: in x one for 0 <= x < alpha, else zero; in
    alpha one for x >= alpha, else zero.  A signed input is clipped at -alpha too, where the derivative in alpha is
    minus one.

    State: `alpha`, NaN until calibrated, and `signed`, 1 for an input with negative values and 0 otherwise.
    """

    signed: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.alpha = nn.Parameter(torch.tensor(math.nan))
        self.register_buffer("signed", torch.zeros(()))

    @property
    def step_size(self) -> Tensor:  # type: ignore[override]
        """Alpha over the number of levels above zero."""
        return self.alpha / self._above_zero()

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """The number of levels below zero."""
        return self.signed * (2 ** (self.bits - 1) - 1)

    def _above_zero(self) -> Tensor:
        return self.levels - self.signed * 2 ** (self.bits - 1)

    def quantize(self, x: Tensor) -> Tensor:
        """Clip with a derivative, round straight through."""
        y = torch.where(x < self.alpha, x, self.alpha)
        low = -self.signed * self.alpha
        y = torch.where(y >= low, y, low)
        # The step is held: PACT's derivative in alpha is that of the clip alone.
        s = self.step_size.detach()
        return (y.detach() / s).round() * s + (y - y.detach())

    @torch.no_grad()
    def calibrate(self, x: Tensor, how: str) -> None:
        """Alpha: the upper end of the range that `how` gives."""
        values = x.detach().float().reshape(1, -1)
        self.signed.copy_((values < 0).any())
        bits = self.bits - int(self.signed)
        step, _ = CALIBRATIONS[how](values.abs(), bits)
        self.alpha.copy_((step[0] * (2**bits - 1)).clamp(min=MIN_STEP))

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Where x is above alpha, or below the lower end."""
        return (x > self.alpha) | (x < -self.signed * self.alpha)

    def scales(self) -> list[nn.Parameter]:
        return [self.alpha]

    def penalties(self, settings: MethodSettings) -> dict[str, Tensor]:
        """Half the squared clipping level: weight decay, without which alpha has no reason to shrink."""
        return {"alpha": settings.alpha_decay / 2 * self.alpha.square()}


class DoReFa(Quantizer):
    """c (2 round(levels t) / levels - 1) with t = tanh(w) / (2 max|tanh(w)|) + 1/2, the maximum over the layer.

    Zhou et al. 2016, arXiv:1606.06160.  The derivative goes through tanh and the maximum, so that weights are not alone
    in it: `elementwise` is False. Nothing is learned. State: `step_size`, 2 c / levels, of shape (); `zero_point`,
    levels / 2, which is not whole, as zero is not on the grid.
    """

    elementwise = False

    def __init__(self, bits: int, rows: int | None = None, ndim: int = 4) -> None:
        super().__init__(bits)  # one scale for a layer, so its rows do not matter
        self.register_buffer("step_size", torch.tensor(math.nan))
        self.register_buffer("zero_point", torch.tensor(self.levels / 2))

    def quantize(self, x: Tensor) -> Tensor:
        """Squash to [0, levels], round straight through, stretch."""
        return (round_straight_through(self._squash(x)) - self.zero_point) * self.step_size

    def _squash(self, x: Tensor) -> Tensor:
        squashed = torch.tanh(x)
        t = squashed / (2 * squashed.abs().max().clamp(min=MIN_STEP)) + 0.5  # a layer of zeros has no maximum
        return self.levels * t

    @torch.no_grad()
    def position(self, x: Tensor) -> Tensor:
        """Levels times t: a step is that of the squashed weight, behind the tanh."""
        return self._squash(x)

    @torch.no_grad()
    def calibrate(self, x: Tensor, how: str) -> None:
        """The factor of least squared error; `how` has no part in it."""
        self.step_size.fill_(1)
        q = self.quantize(x.detach().float())
        self.step_size.copy_(((q * x).sum() / q.square().sum()).clamp(min=MIN_STEP))

    def clipped(self, x: Tensor) -> Tensor:
        """Nowhere: tanh takes every weight into the range."""
        return torch.zeros_like(x, dtype=torch.bool)
