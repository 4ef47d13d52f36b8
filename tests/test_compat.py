"""The drop-in for PyHessian's class: its shapes, dense numbers, and a model left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fpq_analysis import UserError
from fpq_analysis.compat.pyhessian import get_params, hessian
from tests.nets import dense_hessian


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
    return model, (x, y), dense_hessian(model, list(model.parameters()), x, y)


def test_numbers_are_those_of_the_dense_hessian(case):
    model, data, dense = case
    loader = [(data[0][:13], data[1][:13]), (data[0][13:], data[1][13:])]
    for form in ({"data": data}, {"dataloader": loader}):
        ours = hessian(model, nn.CrossEntropyLoss(), cuda=False, **form)
        values, vectors = ours.eigenvalues(top_n=3, tol=1e-8)
        spectrum = torch.linalg.eigvalsh(dense)
        truth = spectrum[spectrum.abs().argsort(descending=True)][:3]
        np.testing.assert_allclose(values, truth.numpy(), rtol=1e-8)
        flat = torch.cat([part.flatten() for part in vectors[0]])
        torch.testing.assert_close(dense @ flat, values[0] * flat, rtol=0, atol=1e-6)
        assert [part.shape for part in vectors[0]] == [p.shape for p in model.parameters()]
        trace = ours.trace()
        assert isinstance(trace, list)
        assert np.mean(trace) == pytest.approx(float(dense.trace()), rel=1e-10)
        nodes, weights = ours.density(iter=10, n_v=2)
        assert np.array(nodes).shape == np.array(weights).shape == (2, 10)
        np.testing.assert_allclose(np.sum(weights, 1), 1)
        nodes, weights = ours.density()
        assert len(nodes) == len(weights) == 1


def test_a_smooth_network_gives_draws_with_their_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = (torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,)))
    draws = hessian(model, nn.CrossEntropyLoss(), data=data).trace(maxIter=60)
    truth = float(dense_hessian(model, list(model.parameters()), *data).trace())
    assert abs(np.mean(draws) - truth) < 4 * np.std(draws, ddof=1) / len(draws) ** 0.5
    assert len(draws) > 1


def test_what_did_not_converge_is_warned_of(case):
    model, data, _ = case
    with pytest.warns(UserWarning, match="raise maxIter"):
        hessian(model, nn.CrossEntropyLoss(), data=data).eigenvalues(maxIter=2, tol=1e-10)


def test_the_model_is_left_alone_and_data_are_needed(case):
    model, data, _ = case
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ours = hessian(model, nn.CrossEntropyLoss(), data=data)
    _, vectors = ours.eigenvalues()
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    moved = get_params(model, nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double(), vectors[0], 0.5)
    torch.testing.assert_close(next(moved.parameters()), next(model.parameters()) + 0.5 * vectors[0][0])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    for form in ({}, {"data": data, "dataloader": [data]}):
        with pytest.raises(UserError, match="one of the two"):
            hessian(model, nn.CrossEntropyLoss(), **form)
