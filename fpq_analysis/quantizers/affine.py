"""Affine quantization with constants that something else has set: the common form of other programs' quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpq_analysis.quantizers.base import Quantizer
from fpq_analysis.quantizers.fake_quantize import round_straight_through


class Affine(Quantizer):
    """(clip(round(x / scale) + zero_point, low, high) - zero_point) scale, as torch's `fake_quantize_*` ops have it.

    Made of plain operations.  The gradient is one where the rounded value is within `low` .. `high`, zero elsewhere;
    in a learned scale and zero point it is that of LSQ (arXiv:1902.08153) and LSQ+ (arXiv:2004.09576).  A zero point
    that is no whole number is added before rounding.

    Args:
        scale, zero_point: of shape (), or broadcastable to x.  Parameters stay parameters.
        low, high: the least and the largest whole number.  `bits` is what it takes to store these.
        factor: x is multiplied by it before, and divided by it after: for a weight that a BatchNorm's slope is folded
            into.  Broadcastable to x, not zero.
    """

    scale: Tensor
    zero: Tensor
    factor: Tensor | None

    def __init__(self, scale: Tensor, zero_point: Tensor, low: int, high: int, *, factor: Tensor | None = None) -> None:
        super().__init__((high - low).bit_length())
        self.low, self.high, self.levels = low, high, high - low
        for name, value in (("scale", scale), ("zero", zero_point), ("factor", factor)):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        if not isinstance(zero_point, nn.Parameter):
            self.zero = zero_point.to(scale.dtype)

    @property
    def step_size(self) -> Tensor:  # type: ignore[override]
        """Of x itself."""
        return self.scale if self.factor is None else self.scale / self.factor.abs()

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """Of the codes 0 .. levels, which are counted from `high` down where the factor is negative."""
        zero = self._zero() - self.low
        return zero if self.factor is None else torch.where(self.factor > 0, zero, self.levels - zero)

    def _zero(self) -> Tensor:
        learned = isinstance(self.zero, nn.Parameter)
        return round_straight_through(self.zero).clamp(self.low, self.high) if learned else self.zero

    def quantize(self, x: Tensor) -> Tensor:
        """On the grid; straight-through."""
        if self.factor is not None:
            x = x * self.factor
        q, clipped = self._rounded(x)
        # A bound is in range: see `fake_quantize`.
        x = (torch.where(q.detach() == clipped, q, clipped) - self._zero()) * self.scale
        return x if self.factor is None else x / self.factor

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zero, ratio = self._zero(), x * (1 / self.scale)
        if bool((zero == zero.round()).all()):
            q = round_straight_through(ratio) + zero
        else:
            q = round_straight_through(ratio + zero)
        return q, q.detach().clamp(self.low, self.high)

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Where the rounded value is below `low` or above `high`."""
        q, inside = self._rounded(x if self.factor is None else x * self.factor)
        return q != inside

    def used(self, weight: Tensor) -> Tensor:
        """What the other program's layer computes with, from the value on the grid."""
        return weight if self.factor is None else weight * self.factor
