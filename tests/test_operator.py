"""Hessian-vector products against the dense Hessian, curvlinops and PyHessian; Hutchinson's estimator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

from fpq_analysis import UserError, hessian_trace
from fpq_analysis.curvature import HessianOperator, as_batches
from fpq_analysis.curvature.pyhessian_engine import pyhessian_trace_samples
from fpq_analysis.linalg import hutchinson
from tests.nets import dense_hessian, networks, tiny


@given(networks())
@settings(max_examples=10)
def test_products_equal_the_dense_hessian(net):
    model, x, y = net
    parameters = dict(model.named_parameters())
    dense = dense_hessian(model, list(parameters.values()), x, y)
    v = torch.randn(len(dense), 3, dtype=torch.float64)
    for micro_batch in (1, 2, 100):  # ragged, and whole
        operator = HessianOperator(model, F.cross_entropy, as_batches((x, y), micro_batch), parameters)
        torch.testing.assert_close(operator.matmat(v), dense @ v, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(operator.matvec(v[:, 0]), dense @ v[:, 0], rtol=1e-10, atol=1e-12)
        assert operator.shape == tuple(dense.shape)
        assert operator.n_products == 4


def smooth_net() -> nn.Module:
    return (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)).double().eval()
    )


def test_products_equal_curvlinops():
    from curvlinops import HessianLinearOperator

    model = smooth_net()
    x, y = torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.randint(4, (7,))
    parameters = dict(model.named_parameters())
    ours = HessianOperator(model, F.cross_entropy, as_batches((x, y), 3), parameters)
    theirs = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(parameters.values()), as_batches((x, y), 3))
    v = torch.randn(ours.size, 2, dtype=torch.float64)
    torch.testing.assert_close(ours.matmat(v), theirs @ v, rtol=1e-10, atol=1e-12)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_a_parameter_the_loss_does_not_use_gives_zeros():
    model = Unused().double()
    data = (torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,)))
    operator = HessianOperator(model, F.cross_entropy, [data], dict(model.named_parameters()))
    v = torch.ones(operator.size, dtype=torch.float64)
    assert (operator.matvec(v)[operator.slices["idle.weight"]] == 0).all()
    assert (operator.matvec(v)[operator.slices["used.weight"]] != 0).any()
    assert hessian_trace(model, data, method="hutchinson", n_probes=5).per_layer["idle"] == 0


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(3, 1).double()
    data = (torch.randn(4, 3, dtype=torch.float64), torch.zeros(4))
    ours = hessian_trace(model, data, loss=lambda z, y: z.mean(), n_probes=5)
    assert ours.value == 0


def test_hutchinson_on_a_known_matrix():
    """Mean and spread in closed form: the variance of a probe is twice the squared norm of the off-diagonal part."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    a = a + a.T
    blocks = [slice(0, 10), slice(10, 40)]
    samples = torch.cat(
        list(hutchinson(lambda v: a @ v, 40, blocks, rounds=[500] * 40, generator=generator, dtype=torch.float64))
    )
    assert samples.shape == (20_000, 2)
    total = samples.sum(1)
    spread = math.sqrt(2 * float((a - a.diagonal().diag()).square().sum()))
    assert float(total.std()) == pytest.approx(spread, rel=0.03)
    for column, block in enumerate(blocks):
        error = float(samples[:, column].std()) / math.sqrt(len(samples))
        assert abs(float(samples[:, column].mean() - a.diagonal()[block].sum())) < 4 * error


def test_hutchinson_interval_covers_the_dense_trace():
    model = smooth_net()
    x, y = torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.randint(4, (7,))
    truth = float(dense_hessian(model, list(model.parameters()), x, y).trace())
    inside = 0
    for seed in range(60):
        ours = hessian_trace(model, (x, y), n_probes=30, seed=seed)
        assert ours.method == "hutchinson"
        inside += abs(ours.value - truth) < 2.045 * ours.sem  # Student's t, 29 degrees of freedom
    assert inside >= 53  # Binomial(60, 0.95): 52 or fewer has a probability of 1 %


def test_hutchinson_reaches_a_tolerance_and_says_when_not(monkeypatch):
    model = smooth_net()
    data = (torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.randint(4, (7,)))
    ours = hessian_trace(model, data, tol=0.05, n_probes=10)
    assert ours.converged
    assert ours.sem <= 0.05 * abs(ours.value)
    assert ours.n_products > 10
    monkeypatch.setattr("fpq_analysis.probes.trace.MAX_DRAWS", 20)
    assert not hessian_trace(model, data, tol=1e-6, n_probes=10).converged


def test_layers_of_hutchinson_add_up():
    ours = hessian_trace(smooth_net(), (torch.randn(7, 1, 8, 8).double(), torch.randint(4, (7,))), n_probes=10)
    assert sum(ours.per_layer.values()) == pytest.approx(ours.value, rel=1e-10)


@pytest.mark.parametrize("micro_batch", [3, 100])
def test_pyhessian_agrees(micro_batch):
    model = tiny(4).double().eval()
    data = (torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(4, (8,)))
    exact = hessian_trace(model, data, method="exact")
    theirs = hessian_trace(model, data, method="pyhessian", n_probes=150, micro_batch=micro_batch)
    assert theirs.n_products == 150
    assert abs(theirs.value - exact.value) < 4 * theirs.sem


def test_pyhessian_is_not_stopped_by_a_negative_mean():
    """Its own rule stops at the second probe there."""
    model = nn.Linear(3, 2).double()
    data = (torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,)))
    negative = lambda z, y: -F.cross_entropy(z, y)  # noqa: E731
    samples = pyhessian_trace_samples(model, negative, [data], dict(model.named_parameters()), 20, 0)
    assert len(samples) == 20
    assert samples.mean() < 0


def test_what_pyhessian_cannot_do_is_an_error():
    with pytest.raises(UserError, match="PyHessian"):
        hessian_trace(Unused(), (torch.randn(5, 4), torch.randint(3, (5,))), method="pyhessian", n_probes=2)


def test_same_seed_same_numbers():
    model = smooth_net()
    data = (torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.randint(4, (7,)))
    a, b, c = (hessian_trace(model, data, n_probes=10, seed=seed) for seed in (0, 0, 1))
    assert a.value == b.value
    assert a.value != c.value
    assert np.isnan(a.sem_data)
    assert a.error == a.sem
