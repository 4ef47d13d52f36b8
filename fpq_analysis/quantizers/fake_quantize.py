"""Rounding to a grid with a straight-through gradient, in two forms of equal value and equal first derivative.

`fake_quantize` is made of plain differentiable operations: it can be differentiated as often as needed, in the values
and in the step size.  `FusedFakeQuantize` computes the same in fewer passes over memory; in the step size it can be
differentiated once only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def round_straight_through(x: Tensor) -> Tensor:
    """Round to whole numbers; the derivative is one.

    The usual `x + (round(x) - x).detach()` gives the whole number only up to rounding error, so that a value on the
    last level can fall outside the clip by 1e-7 and lose its gradient.  `x - x.detach()` is exactly zero.
    """
    return x.round().detach() + (x - x.detach())


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` exactly, with its gradient multiplied by `factor`."""
    return x.detach() + (x - x.detach()) * factor


def fake_quantize(x: Tensor, step_size: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """(clip(round(x/s) + z, 0, levels) - z) s, the quantizer of FPQ Eq. 3, twice differentiable in x and s.

    Gradients are LSQ's (Esser et al. 2020, arXiv:1902.08153), rounding before clipping: in range dx = 1 and
    ds = round(x/s) - x/s; below and above dx = 0 and ds = -z and levels - z.

    Args:
        x: any shape.
        step_size, zero_point: s > 0 and whole z, broadcastable to x.
        levels: 2^bits - 1.
    """
    q = round_straight_through(x / step_size)
    # Not q.clamp(): what torch gives as its derivative on a bound is one, a half or zero, by release and overload, and
    # values on a bound are many here (every zero behind a ReLU).  The published gradient is one.
    clipped = torch.clamp(q.detach(), -zero_point, levels - zero_point)
    return torch.where(q.detach() == clipped, q, clipped) * step_size


def refuse_second_derivative(function: type) -> None:
    """Raise if the backward pass under way is itself to be differentiated.

    torch's `once_differentiable` does not: where the incoming gradient is a constant it gives zero, silently.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{function.__name__} can be differentiated once only; leave the trainer's fast form off.")


class FusedFakeQuantize(torch.autograd.Function):
    """`fake_quantize` for one scalar step size, in place where it can be.

    Differentiable in x as often as needed, in the step size once.  Neither direction waits for the device.
    """

    piecewise_linear_in = (0,)  # read by curvature/functions.py

    @staticmethod
    def forward(ctx: Any, x: Tensor, step_size: Tensor, zero_point: Tensor, levels: int) -> Tensor:
        centre = levels / 2 - zero_point
        q = (x / step_size).round_().sub_(centre).clamp_(-levels / 2, levels / 2).add_(centre).mul_(step_size)
        ctx.save_for_backward(x, q if ctx.needs_input_grad[1] else None, step_size, centre)
        ctx.levels = levels
        return q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, q, step_size, centre = ctx.saved_tensors
        bound = ctx.levels / 2 + 0.5
        if not ctx.needs_input_grad[1]:
            # Linear in `grad`, with a mask that is constant but for jumps: torch differentiates this once more.
            where = (x.detach() / step_size.detach()).round_().sub_(centre)
            return torch.ops.aten.hardtanh_backward(grad, where, -bound, bound), None, None, None
        refuse_second_derivative(FusedFakeQuantize)
        # Two buffers, each written several times: on a CPU, fresh memory costs more than the arithmetic.
        first = (x / step_size).round_().sub_(centre)
        # The derivative of a clip: `grad` strictly inside the bounds, zero elsewhere; one vectorised pass.
        dx = torch.ops.aten.hardtanh_backward.grad_input(grad, first, -bound, bound, grad_input=first)
        # sum g (q - x) over all, plus sum g x over the clipped: no large terms that cancel.
        second = q - x
        ds = _dot(grad, second)
        ds = (ds + _dot(torch.sub(grad, dx, out=second), x)) / step_size
        return dx if ctx.needs_input_grad[0] else None, ds, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b without writing the product, where the layouts allow it."""
    if a.stride() == b.stride() and a.numel() > 0 and _is_dense(a):
        n = a.numel()
        return torch.dot(a.as_strided((n,), (1,)), b.as_strided((n,), (1,)))
    return (a * b).sum()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
