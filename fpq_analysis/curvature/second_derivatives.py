"""Convolution and BatchNorm, with second derivatives that cost what the first do; weight norm and PReLU, right ones.

The first two maps are linear in each of their arguments, so the derivatives of their gradients are the same few kernels
with the arguments changed about.  PyTorch's own second derivatives are general instead: those of a grouped convolution
go through the groups one by one, of a BatchNorm through a dozen passes over the activations.  Values and gradients here
come from PyTorch's kernels and are the same to the last bit.  The second derivative of PyTorch's weight norm is wrong:
its gradient takes the norm for a constant, and Hessians are not even symmetric.  That of its PReLU takes the other
slope at zero than the first does, and zeros are many behind a quantizer or a ReLU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fpq_analysis.errors import UserError

aten = torch.ops.aten
# How PyTorch says that a derivative can be taken once only.
ONCE = re.compile(
    r"derivative for '?[\w:.]+'? is not implemented|once_differentiable|[Dd]ouble backward|once only|Sparse"
)
PLAIN: set[type] = {Tensor, nn.Parameter}


class SecondDerivatives(TorchFunctionMode):
    """Inside, convolutions, BatchNorm in eval mode, weight norm and PReLU are those of this module, wherever called.

    Within transforms of `torch.func` the first two are PyTorch's.  `torch.autograd.forward_ad` is not
    supported.

    Args:
        exchanged: convolutions and BatchNorm; without, the other two alone.
    """

    def __init__(self, exchanged: bool = True) -> None:
        super().__init__()
        self.exchanged = exchanged

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not PLAIN.issuperset(types):  # a kind of tensor with functions of its own
            return function(*args, **kwargs)
        if function is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        if function in PRELU:
            return _prelu(*args, **kwargs)
        if (
            not self.exchanged or torch._C._are_functorch_transforms_active()
        ):  # they want rules of their own from every Function
            return function(*args, **kwargs)
        if function in CONVOLUTIONS:
            return _convolution(function, *args, **kwargs)
        if function is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return function(*args, **kwargs)


def check_twice(error: RuntimeError) -> None:
    """Raise a `UserError` that names the operation, if the error says that it cannot be differentiated twice."""
    if ONCE.search(str(error)) is None:
        return
    first = str(error).split(". ")[0].strip().partition("\n")[0].rstrip(".")
    raise UserError(
        f"The model has no second derivative ({first}). `fpq-analyze doctor` names the operation, and what to use in "
        "its place; for attention of Hugging Face's models that is attn_implementation='eager' (PyTorch's own is "
        "exchanged already). Or take what needs first derivatives alone, the trace of the Gauss-Newton matrix: "
        "hessian_trace(..., operator='gauss-newton')."
    ) from error


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


PRELU = (torch.prelu, Tensor.prelu)


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    slopes = weight if weight.numel() == 1 else weight.reshape(-1, *[1] * (input.ndim - 2))
    return torch.where(input > 0, input, slopes * input)


# With the number of dimensions of an image.
CONVOLUTIONS: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


def _convolution(
    plain: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    n = CONVOLUTIONS[plain]
    if isinstance(padding, str) or input.ndim != n + 2 or input.is_complex():
        return plain(input, weight, bias, stride, padding, dilation, groups)
    by_axis = ([at] * n if isinstance(at, int) else list(at) * (n // len(at)) for at in (stride, padding, dilation))
    return _Convolution.apply(input, weight, bias, (*by_axis, False, [0] * n, groups))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how, ctx.sizes = how, None if b is None else list(b.shape)
        return aten.convolution(x, w, b, *how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return *_ConvolutionGradients.apply(g, x, w, ctx.sizes, ctx.how, ctx.needs_input_grad[:3]), None


class _ConvolutionGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, sizes: list[int] | None, how: tuple[Any, ...], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)
        ctx.how = how
        return aten.convolution_backward(g, x, w, sizes, *how, list(wanted))

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, w = ctx.saved_tensors
        how, (to_g, to_x, to_w, *_) = ctx.how, ctx.needs_input_grad
        by_g = by_x = by_w = None
        if to_g:
            if vw is not None:
                by_g = aten.convolution(x, vw, vb, *how)
            elif vb is not None:
                by_g = vb.view(-1, *[1] * (g.ndim - 2)).expand_as(g)
            if vx is not None:
                moved = aten.convolution(vx, w, None, *how)
                by_g = moved if by_g is None else moved.add_(by_g)
        if to_x and vw is not None:
            by_x, _, _ = aten.convolution_backward(g, x, vw, None, *how, [True, False, False])
        if to_w and vx is not None:
            _, by_w, _ = aten.convolution_backward(g, vx, w, None, *how, [False, True, False])
        return by_g, by_x, by_w, None, None, None


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    statistics = running_mean, running_var
    if training or weight is None or bias is None or any(t is None or t.requires_grad for t in statistics):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(input, weight, bias, *statistics, eps)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, w, mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, w, b, eps=eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        return *_BatchNormGradients.apply(g, *ctx.saved_tensors, ctx.eps, wanted), None, None, None


class _BatchNormGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, var: Tensor, eps: float, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w, mean, var)
        ctx.eps = eps
        return aten.native_batch_norm_backward(g, x, w, mean, var, None, None, False, eps, list(wanted))

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, w, mean, var = ctx.saved_tensors
        by_g = by_x = by_w = None
        zero = torch.zeros_like(var)
        if ctx.needs_input_grad[0]:
            if vw is not None or vb is not None:
                by_g = F.batch_norm(x, mean, var, zero if vw is None else vw, zero if vb is None else vb, eps=ctx.eps)
            if vx is not None:
                scale = (w * (var + ctx.eps).rsqrt()).view(-1, *[1] * (x.ndim - 2))
                by_g = vx * scale if by_g is None else by_g.addcmul_(vx, scale)
        to_x, to_w = ctx.needs_input_grad[1] and vw is not None, ctx.needs_input_grad[2] and vx is not None
        if to_x or to_w:
            # One gradient of a BatchNorm with scale vw, of inputs vx without a mean.
            inputs = x if vx is None else vx
            by_x, by_w, _ = _BatchNormGradients.apply(g, inputs, vw, zero, var, ctx.eps, (to_x, to_w, False))
        return by_g, by_x, by_w, None, None, None, None
