"""Convolution and BatchNorm against PyTorch's own second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.curvature.second_derivatives import SecondDerivatives


def derivatives(function: Callable[[], Tensor], variables: list[Tensor], seed: int) -> list[list[Tensor]]:
    """Value, gradients, and second derivatives along random vectors, those of each gradient alone and of all."""
    generator = torch.Generator().manual_seed(seed)
    value = function()
    slope = torch.randn(value.shape, generator=generator, dtype=value.dtype).requires_grad_()
    gradients = torch.autograd.grad(value, variables, slope, create_graph=True)
    along = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients]
    some = [gradients, *([g] for g in gradients)]
    vectors = [along, *([v] for v in along)]
    second = [
        torch.autograd.grad(gs, [slope, *variables], vs, retain_graph=True, allow_unused=True)
        for gs, vs in zip(some, vectors, strict=True)
    ]
    filled = [[torch.zeros(()) if t is None else t for t in one] for one in second]
    return [[value.detach()], list(gradients), *filled]


def check(function: Callable[[], Tensor], variables: list[Tensor], seed: int) -> None:
    plain = derivatives(function, variables, seed)
    with SecondDerivatives():
        found = derivatives(function, variables, seed)
    for a, b in zip(plain[:2], found[:2], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))  # to the last bit
    for a, b in zip(plain[2:], found[2:], strict=True):
        for x, y in zip(a, b, strict=True):
            # Nothing in place of zeros, and the other way round, is the same.
            torch.testing.assert_close(y.expand(x.shape) if y.ndim == 0 else y, x.expand(y.shape) if x.ndim == 0 else x)


@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    ratio=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_convolution(dims, groups, ratio, kernel, stride, padding, dilation, bias, seed):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(seed)
    layer = kind(
        4, 4 * ratio, kernel, 1 if padding == "same" else stride, padding, dilation, groups=groups, bias=bias
    ).double()
    x = torch.randn(2, 4, *[6, 5, 7][:dims], dtype=torch.float64, requires_grad=True)
    check(lambda: layer(x).tanh(), [x, *layer.parameters()], seed)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(4, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 3)]),
    affine=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_batch_norm(shape, affine, training, seed):
    torch.manual_seed(seed)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer = kind(3, affine=affine, momentum=0.0).double().train(training)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.1, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    check(lambda: layer(x).tanh(), [x, *layer.parameters()], seed)


def test_inputs_without_gradient_and_functions_called_by_hand():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    w = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(4, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    check(
        lambda: F.batch_norm(F.conv2d(x, w, None, (2, 1), (0, 1)), mean, var, scale, torch.zeros_like(scale)).tanh(),
        [w, scale],
        0,
    )
    check(lambda: F.conv2d(x[0], w[:, :2]).tanh(), [w], 0)  # no batch


def test_tensors_of_other_kinds_keep_their_own_convolution():
    class Mine(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "mine"

    with SecondDerivatives():
        assert F.conv2d(torch.zeros(1, 1, 3, 3).as_subclass(Mine), torch.zeros(1, 1, 3, 3)) == "mine"


def test_third_derivatives_are_right_too():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def third() -> Tensor:
        (g,) = torch.autograd.grad(F.conv2d(x, w).pow(4).sum(), w, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gg.pow(3).sum(), w)[0]

    plain = third()
    with SecondDerivatives():
        torch.testing.assert_close(third(), plain)


def test_layers_and_functions_are_exchanged():
    x, w, one = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, requires_grad=True), torch.ones(2)
    with SecondDerivatives():
        made = [F.conv2d(x, w), nn.Conv2d(2, 2, 3)(x), F.batch_norm(x, one, one, one.clone().requires_grad_(), one)]
        made += [nn.BatchNorm2d(2).eval()(x)]
        kept = [nn.BatchNorm2d(2)(x), nn.ConvTranspose2d(2, 2, 3)(x)]
    assert [t.grad_fn.name() for t in made] == ["_ConvolutionBackward"] * 2 + ["_BatchNormBackward"] * 2
    assert [t.grad_fn.name() for t in kept] == ["NativeBatchNormBackward0", "ConvolutionBackward0"]


def test_slopes_of_a_network_through_batch_norm():
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def second() -> list[list[Tensor]]:
        slope = lambda: torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)[0]  # noqa: E731
        return derivatives(slope, [x, layer.weight], 0)

    plain = second()
    with SecondDerivatives():
        torch.testing.assert_close(second(), plain)


def test_transforms_of_torch_func_within():
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    w = torch.randn(2, 3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    check(lambda: torch.func.vmap(lambda one: F.conv2d(x, one).tanh())(w), [w], 0)


def test_weight_norm_is_differentiated_through_its_norm():
    torch.manual_seed(0)
    v = torch.randn(3, 4, dtype=torch.float64)
    g = torch.rand(3, 1, dtype=torch.float64)
    truth = torch.autograd.functional.hessian(lambda v: (v * g / v.norm(dim=1, keepdim=True)).pow(3).sum(), v)
    with SecondDerivatives():
        found = torch.autograd.functional.hessian(lambda v: torch._weight_norm(v, g).pow(3).sum(), v)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("slopes", [1, 3])
def test_prelu_has_one_slope_at_zero(slopes):
    """PyTorch's second derivative takes another one there than its first: Hessians were not symmetric."""
    layer = nn.PReLU(slopes).double()
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    x[:, :, 0] = 0
    plain = derivatives(lambda: layer(x.requires_grad_()), [x, layer.weight], 0)
    with SecondDerivatives():
        found = derivatives(lambda: layer(x), [x, layer.weight], 0)
    for a, b in zip(plain[:2], found[:2], strict=True):
        torch.testing.assert_close(a, b)
    v = torch.randn_like(x)
    with SecondDerivatives():
        g = torch.zeros_like(x).requires_grad_()
        (back,) = torch.autograd.grad(layer(x), x, g, create_graph=True)
        (forward,) = torch.autograd.grad(back, g, v)
    torch.testing.assert_close(forward, torch.where(x > 0, v, layer.weight.reshape(1, -1, 1) * v))
