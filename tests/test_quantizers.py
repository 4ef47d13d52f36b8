"""Quantizers against the published formulas; what turns a float model into a quantized one and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fpq_analysis import QuantSpec, UserError, calibrate, quantize
from fpq_analysis.quantizers import (
    LSQ,
    clipped_fraction,
    fused_quantizers,
    quantizer_parameters,
    quantizers,
    variables,
    view,
)
from fpq_analysis.quantizers.calibration import minmax, mse
from fpq_analysis.quantizers.fake_quantize import FusedFakeQuantize, fake_quantize
from tests.nets import tiny


def lsq_by_hand(x, s, z, levels, g):
    """Eq. 3 and LSQ's gradients, element by element, in plain numpy."""
    k = np.round(x / s) + z
    inside = (k >= 0) & (k <= levels)
    value = (np.clip(k, 0, levels) - z) * s
    dx = g * inside
    ds = np.where(inside, np.round(x / s) - x / s, np.where(k < 0, -z, levels - z)) * g
    return value, dx, ds.sum()


@given(
    st.integers(2, 8),
    st.integers(0, 1000),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.booleans(),
)
def test_value_and_gradients_are_the_published_ones(bits, seed, zero, step, fused):
    """Values inside, below and above the range, and on its bounds."""
    levels = 2**bits - 1
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) * step * levels
    x[0] = x[0].relu()  # many values exactly at zero, on a bound of the range where zero = 0
    x[1, 0] = (levels - zero) * step  # and exactly on the upper one
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    s = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    function = FusedFakeQuantize.apply if fused else fake_quantize
    out = function(x, s, torch.tensor(zero, dtype=torch.float64), levels)
    dx, ds = torch.autograd.grad(out, [x, s], g)
    value, dx_true, ds_true = lsq_by_hand(x.detach().numpy(), step, zero, levels, g.numpy())
    np.testing.assert_array_equal(out.detach().numpy(), value)
    np.testing.assert_allclose(dx.numpy(), dx_true, rtol=1e-14)
    assert float(ds) == pytest.approx(ds_true, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_form_equals_the_plain_one_in_float32(memory_format):
    x = (3 * torch.randn(8, 16, 12, 12)).relu().contiguous(memory_format=memory_format).requires_grad_()
    g = torch.randn(8, 16, 12, 12)  # of the other layout, in one of the cases
    s = torch.tensor(0.21, requires_grad=True)
    results = []
    for function in (FusedFakeQuantize.apply, fake_quantize):
        out = function(x, s, torch.tensor(2.0), 15)
        results.append((out, *torch.autograd.grad(out, [x, s], g)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-4)


def test_fused_form_has_the_second_derivative_of_the_plain_one():
    """In the values, with values on the bounds of the range and outside of it."""
    x = torch.linspace(-1, 2, 61, dtype=torch.float64).requires_grad_()
    s, zero = torch.tensor(0.1, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    results = []
    for function in (FusedFakeQuantize.apply, fake_quantize):
        (first,) = torch.autograd.grad(function(x * x, s, zero, 15).pow(3).sum(), x, create_graph=True)
        results.append((first, *torch.autograd.grad(first.sum(), x)))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-14, atol=0)
        assert 0 < int((plain != 0).sum()) < len(x)


def test_fused_form_refuses_a_second_derivative_in_the_step_size():
    """torch's `once_differentiable` let this pass, with a second derivative of zero."""
    x = torch.randn(3, requires_grad=True)
    out = FusedFakeQuantize.apply(x * x, torch.tensor(0.1, requires_grad=True), torch.tensor(2.0), 15)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 1000), st.sampled_from(["mse", "minmax"]))
def test_outputs_lie_on_the_grid(bits, seed, how):
    torch.manual_seed(seed)
    w = torch.randn(6, 4, 3, 3) * torch.rand(6, 1, 1, 1)
    quantizer = LSQ(bits, rows=6)
    quantizer.calibrate(w, how)
    for row in range(6):
        assert len(quantizer(w)[row].unique()) <= 2**bits
        k = quantizer(w)[row] / quantizer.step_size[row] + quantizer.zero_point[row]
        torch.testing.assert_close(k, k.round(), atol=1e-3, rtol=0)
        assert k.min() > -0.01
        assert k.max() < 2**bits - 1 + 0.01
    assert (quantizer(torch.zeros_like(w)) == 0).all()  # zero is exact


def test_gradient_scale():
    weight = LSQ(4, rows=6)
    assert weight.gradient_scale(torch.zeros(6, 5, 3, 3)) == pytest.approx(1 / math.sqrt(45 * 15))
    activation = LSQ(2)
    assert activation.gradient_scale(torch.zeros(128, 5, 4, 4)) == pytest.approx(1 / math.sqrt(80 * 3))
    x = torch.randn(2, 3)
    activation.calibrate(x, "minmax")
    slopes = []
    for training in (True, False):
        activation.train(training)
        (slope,) = torch.autograd.grad((activation(x) * x).sum(), activation.step_size)
        slopes.append(float(slope))
    assert slopes[0] == pytest.approx(slopes[1] / math.sqrt(3 * 3))


def test_minmax_is_eq_4_and_5():
    x = torch.tensor([[-1.0, 0.0, 2.0], [0.5, 1.0, 3.0], [0.0, 0.0, 0.0]])
    step, zero = minmax(x, 2)
    torch.testing.assert_close(step, torch.tensor([1.0, 1.0, 1.0]))  # the second row's range is widened to hold zero
    torch.testing.assert_close(zero, torch.tensor([1.0, 0.0, 0.0]))


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 1000))
def test_mse_is_never_worse_than_minmax(bits, seed):
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(seed))
    errors = []
    for how in (mse, minmax):
        step, zero = how(x, bits)
        errors.append((fake_quantize(x, step[:, None], zero[:, None], 2**bits - 1) - x).square().mean(1))
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_an_uncalibrated_quantizer_is_loud():
    assert LSQ(4)(torch.randn(5)).isnan().all()


def test_which_layers_get_which_bits():
    model = quantize(tiny(), QuantSpec.parse("W2A4"))
    found = {(name, is_weight): q.bits for name, q, is_weight in quantizers(model)}
    assert found == {
        ("0", True): 8, ("0", False): 8, ("3", True): 2, ("3", False): 4, ("6", True): 2, ("6", False): 4,
        ("11", True): 8, ("11", False): 8,
    }  # fmt: skip
    weights_only = quantize(tiny(), QuantSpec.parse("W4A32"))
    assert all(is_weight for _, _, is_weight in quantizers(weights_only))


def test_the_float_model_is_not_changed_and_w32a32_equals_it():
    model = tiny().eval()
    x = torch.randn(4, 1, 8, 8)
    before = model(x)
    same = quantize(model, QuantSpec.parse("W32A32"))
    assert torch.equal(same(x), before)
    quantize(model, QuantSpec.parse("W2A2"))
    assert torch.equal(model(x), before)


def test_a_reloaded_model_gives_the_same_output():
    model = quantize(tiny(), QuantSpec.parse("W4A4"))
    x = torch.randn(16, 1, 8, 8)
    calibrate(model, x, "mse")
    other = quantize(tiny(), QuantSpec.parse("W4A4"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_calibration_keeps_mode_and_statistics():
    model = quantize(tiny(), QuantSpec.parse("W4A4")).train()
    statistics = model[1].running_mean.clone()
    calibrate(model, torch.randn(16, 1, 8, 8), "mse")
    assert model.training
    assert torch.equal(statistics, model[1].running_mean)
    assert all(torch.isfinite(q.step_size).all() for _, q, _ in quantizers(model))


def test_views_share_nothing_with_the_model():
    model = quantize(tiny(), QuantSpec.parse("W4A4")).eval()
    x = torch.randn(4, 1, 8, 8)
    calibrate(model, x, "mse")
    before = model(x)
    plain, latent, bare = (view(model, definition) for definition in ("dequantized", "latent", "float"))
    assert torch.equal(plain(x), before)
    assert torch.equal(latent(x), before)
    assert torch.equal(bare[3].weight, model[3].parametrizations.weight.original)
    # Step sizes are held, which lets quantizers take their fast form.
    assert not any(p.requires_grad for copy in (plain, latent, bare) for p in quantizer_parameters(copy))
    assert all(p.requires_grad for p in quantizer_parameters(model))
    assert set(variables(plain)) == set(variables(latent)) == set(variables(bare)) == set(variables(tiny()))
    with torch.no_grad():
        for copy in (plain, latent, bare):
            for p in copy.parameters():
                p.zero_()
    assert torch.equal(model(x), before)
    with fused_quantizers(model):
        assert torch.equal(model(x), before)


def test_clipped_fraction():
    model = quantize(nn.Sequential(nn.Linear(3, 1), nn.Linear(3, 1)), QuantSpec(2, 2, 2, "minmax", "minmax"))
    assert clipped_fraction(model) == 0
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.tensor([[100.0, -100.0, 0.0]]))
    assert clipped_fraction(model) == pytest.approx(2 / 6)
    assert clipped_fraction(tiny()) == 0


@pytest.mark.parametrize("text", ["W0A4", "W4", "4/4", "W1A4", "W4A64", "", "W-4A4"])
def test_bad_bits(text):
    with pytest.raises(UserError, match="W4A4"):
        QuantSpec.parse(text)


def test_quantizing_twice_or_nothing():
    with pytest.raises(UserError, match="already"):
        quantize(quantize(tiny(), QuantSpec.parse("W4A4")), QuantSpec.parse("W4A4"))
    with pytest.raises(UserError, match="nothing to quantize"):
        quantize(nn.ReLU(), QuantSpec.parse("W4A4"))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(UserError, match="share one weight"):
        quantize(tied, QuantSpec.parse("W4A4"))
