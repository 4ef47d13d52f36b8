"""Eigenvalues and spectral density of networks, against their dense Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fpq_analysis import (
    QuantSpec,
    UserError,
    calibrate,
    hessian_eigs,
    quantize,
    spectral_density,
)
from fpq_analysis.probes.subject import prepare
from tests.nets import FunctionalGelu, dense_hessian, networks, tiny


def dense(model, data, definition="dequantized"):
    subject = prepare(model, data, definition=definition)
    return dense_hessian(subject.view, list(subject.parameters.values()), *data)


@given(networks(), st.sampled_from(["LA", "SA", "LM"]), st.sampled_from([None, "W2A4", "W4A32"]))
@settings(max_examples=8)
def test_eigenvalues_of_random_networks_equal_the_dense_ones(net, which, bits):
    model, x, y = net
    if bits:
        model = quantize(model, QuantSpec.parse(bits)).double()
        calibrate(model, x, "mse")
    spectrum = torch.linalg.eigvalsh(dense(model, (x, y)))
    found = hessian_eigs(model, (x, y), 2, which=which, tol=1e-9, micro_batch=3)
    key = {"LA": -spectrum, "SA": spectrum, "LM": -spectrum.abs()}[which]
    truth = spectrum[key.argsort()][:2].numpy()
    scale = float(spectrum.abs().max())
    # Of equal magnitude, either sign may come first.
    assert np.allclose(np.abs(found.values), np.abs(truth), rtol=1e-8, atol=1e-8 * scale)
    assert found.converged.all()


@pytest.mark.parametrize("operator", ["hessian", "gauss-newton", "fisher"])
def test_a_smooth_network_and_its_eigenvectors(operator):
    model = FunctionalGelu().double()
    data = (torch.randn(9, 6, dtype=torch.float64), torch.randint(3, (9,)))
    matrix = prepare(model, data).operator(operator)
    truth = matrix.dense()
    torch.testing.assert_close(truth, truth.T, rtol=1e-10, atol=1e-14)
    found = hessian_eigs(model, data, 3, operator=operator, tol=1e-9, eigenvectors=True)
    np.testing.assert_allclose(found.values, torch.linalg.eigvalsh(truth).flip(0)[:3].numpy(), rtol=1e-8, atol=1e-12)
    assert [v.shape for v in found.vectors.values()] == [(3, *p.shape) for p in model.parameters()]
    flat = torch.cat([v.flatten(1) for v in found.vectors.values()], 1)
    torch.testing.assert_close(truth @ flat[0], found.values[0] * flat[0], rtol=0, atol=1e-8)
    residual = float((truth @ flat[2] - found.values[2] * flat[2]).norm())
    assert found.residuals[2] == pytest.approx(residual, rel=1e-3, abs=1e-12)


@given(networks())
@settings(max_examples=4)
def test_moments_of_the_density_agree_with_the_dense_hessian(net):
    model, x, y = net
    spectrum = torch.linalg.eigvalsh(dense(model, (x, y)))
    measure = spectral_density(model, (x, y), n_draws=20, n_steps=12)
    for power in (1, 2):
        value, sem = measure.moment(power)
        assert abs(value - float((spectrum**power).sum())) < 4.5 * sem + 1e-9 * abs(value)
    assert measure.nodes.max() <= float(spectrum.max()) * (1 + 1e-10)


def test_an_asymmetric_matrix_is_refused():
    class Crooked(torch.autograd.Function):
        """x^2, whose backward is not its derivative and depends on x in another way."""

        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad * w, grad * x * w.sum()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(6, dtype=torch.float64) + 1)
            self.head = nn.Linear(6, 3).double()

        def forward(self, x):
            return self.head(Crooked.apply(x, self.scale.expand_as(x)))

    data = (torch.randn(9, 6, dtype=torch.float64), torch.randint(3, (9,)))
    with pytest.raises(UserError, match="not symmetric"):
        hessian_eigs(Net(), data, 2, definition="latent")
    with pytest.raises(UserError, match="not symmetric"):
        spectral_density(Net(), data, definition="latent")
    with pytest.raises(UserError, match="a backward is no derivative"):
        hessian_eigs(Net(), data, 2)


def test_a_warm_start_takes_fewer_products():
    """The second network, near the first, takes fewer products and gives what a cold start gives."""
    torch.manual_seed(0)
    model, data = tiny(4).eval(), (torch.randn(32, 1, 8, 8), torch.randint(4, (32,)))
    start = hessian_eigs(model, data, 2).start
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-4 * torch.randn_like(p))
    cold, warm = (hessian_eigs(model, data, 2, start=known) for known in (None, start))
    assert warm.n_products < cold.n_products
    assert warm.converged.all()
    assert warm.values == pytest.approx(cold.values, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "at least one"),
        ({"k": 100_000}, "k is 100000"),
        ({"k": 100_000, "n_products": 100_000}, "100000 eigenvalues were asked of a matrix"),
        ({"which": "LR"}, "Unknown end 'LR'"),
        ({"tol": 0.0}, "between 0 and 1"),
        ({"operator": "hesian"}, "did you mean 'hessian'"),
        ({"start": torch.zeros(3)}, "3 rows"),
        ({"parameters": "nothing*"}, "No parameter"),
    ],
)
def test_bad_settings(options, message):
    data = (torch.randn(4, 1, 8, 8), torch.randint(4, (4,)))
    with pytest.raises(UserError, match=message):
        hessian_eigs(tiny(4).eval(), data, **options)


def test_weights_that_are_nan_are_named_as_such():
    model = tiny(4).eval()
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        hessian_eigs(model, (torch.randn(4, 1, 8, 8), torch.randint(4, (4,))))
