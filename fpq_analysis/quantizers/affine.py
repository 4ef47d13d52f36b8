"""Affine quantization with constants that something else has set: the common form of other programs' quantizers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fpq_analysis.quantizers.base import Quantizer
from fpq_analysis.quantizers.fake_quantize import round_straight_through


def affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    *,
    quotient: bool = False,
    torch_clamp: bool = False,
) -> Tensor:
    """(clip(round(x / scale) + zero_point, low, high) - zero_point) scale, as torch's `fake_quantize_*` ops have it.

    Made of plain operations.  The gradient is one where the rounded value is within `low` .. `high`, zero elsewhere;
    in scale and zero point it is that of LSQ (arXiv:1902.08153) and LSQ+ (arXiv:2004.09576).

    Args:
        scale, zero_point: broadcastable to x.
        low, high: the least and the largest whole number.
        quotient: round(x / scale + zero_point), in place of torch's round(x (1 / scale)) + zero_point.  They differ in
            the last digit of the ratio, and where it is halfway.
        torch_clamp: values that are rounded to `low` or `high` have the gradient of `torch.clamp` at its bounds, which
            depends on torch's version (none in 2.14).
    """
    q, clipped = _rounded(x, scale, zero_point, low, high, quotient)
    if torch_clamp:
        return (q.clamp(low, high) - zero_point) * scale
    # A bound is in range: see `fake_quantize`.
    return (torch.where(q.detach() == clipped, q, clipped) - zero_point) * scale


def _rounded(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, quotient: bool
) -> tuple[Tensor, Tensor]:
    if quotient:
        q = round_straight_through(x / scale + zero_point)
    elif bool((zero_point == zero_point.round()).all()):
        q = round_straight_through(x * (1 / scale)) + zero_point
    else:  # in torch, too, it is added before rounding if it is no whole number
        q = round_straight_through(x * (1 / scale) + zero_point)
    return q, q.detach().clamp(low, high)


class Affine(Quantizer):
    """`affine` with constants.

    Args:
        scale, zero_point: of shape (), or broadcastable to x.  Parameters stay parameters; the zero point is rounded.
        low, high: the least and the largest whole number.  `bits` is what it takes to store these.
        factor: x is multiplied by it before, and divided by it after: for a weight that a BatchNorm's slope is folded
            into.  Broadcastable to x, not zero.
        quotient, torch_clamp: see `affine`.
    """

    scale: Tensor
    zero: Tensor
    factor: Tensor | None

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor,
        low: int,
        high: int,
        *,
        factor: Tensor | None = None,
        quotient: bool = False,
        torch_clamp: bool = False,
    ) -> None:
        super().__init__((high - low).bit_length())
        self.low, self.high, self.levels = low, high, high - low
        self.quotient, self.torch_clamp = quotient, torch_clamp
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
        x = x if self.factor is None else x * self.factor
        how = {"quotient": self.quotient, "torch_clamp": self.torch_clamp}
        x = affine(x, self.scale, self._zero(), self.low, self.high, **how)
        return x if self.factor is None else x / self.factor

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Where the rounded value is below `low` or above `high`."""
        x = x if self.factor is None else x * self.factor
        q, inside = _rounded(x, self.scale, self._zero(), self.low, self.high, self.quotient)
        return q != inside


class Dynamic(Quantizer):
    """`affine` with constants that are worked out from each x: of activations, so that it has no step size to speak of.

    Args:
        choose: gives scale and zero point of an x, broadcastable to it.
        low, high, torch_clamp: as for `Affine`.
    """

    def __init__(
        self, choose: Callable[[Tensor], tuple[Tensor, Tensor]], low: int, high: int, *, torch_clamp: bool = False
    ) -> None:
        super().__init__((high - low).bit_length())
        self.choose, self.low, self.high, self.levels = choose, low, high, high - low
        self.torch_clamp = torch_clamp
        self.step_size = self.zero_point = torch.empty(0)

    def quantize(self, x: Tensor) -> Tensor:
        """On the grid; straight-through."""
        return affine(x, *self._constants(x), self.low, self.high, torch_clamp=self.torch_clamp)

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Where the rounded value is below `low` or above `high`."""
        q, inside = _rounded(x, *self._constants(x), self.low, self.high, False)
        return q != inside

    @torch.no_grad()
    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self.choose(x.detach())
        return scale.to(x.dtype), zero.to(x.dtype)
