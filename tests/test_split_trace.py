"""Tr H = Tr G + Tr R: the parts against dense matrices, and the estimate's interval against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fpq_analysis import UserError, hessian_trace
from fpq_analysis.curvature import GaussNewtonOperator, HessianOperator, ResidualOperator
from fpq_analysis.curvature.residual import curved
from fpq_analysis.losses import LOSSES
from fpq_analysis.probes.split_trace import split_trace
from fpq_analysis.probes.subject import prepare
from tests.nets import OUTSIDE, tiny


class Late(nn.Module):
    """Smooth behind the first layer, for some samples only if `rare`; piecewise linear in the head and a branch."""

    def __init__(self, rare=False):
        super().__init__()
        self.rare = rare
        self.first, self.branch, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        h = F.silu(h) if not self.rare or bool((x[:, 0] > 0.8).any()) else h.relu()
        return self.head(h + self.branch(x).relu())


def data(n=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def late(rare=False):
    torch.manual_seed(0)
    return Late(rare).double()


@pytest.mark.parametrize("build", [*OUTSIDE, Late])
def test_the_rest_is_what_the_hessian_has_beside_the_gauss_newton_matrix(build):
    torch.manual_seed(0)
    model, (x, y) = build().double(), data()
    parameters, loss = dict(model.named_parameters()), LOSSES["cross_entropy"]
    of = (model, loss, [(x[:3], y[:3]), (x[3:], y[3:])], parameters)
    rest = ResidualOperator(*of).dense()
    torch.testing.assert_close(rest, HessianOperator(*of).dense() - GaussNewtonOperator(*of).dense())
    outside = curved(*of[:1], of[2], parameters)
    assert bool(outside) == bool(rest.diagonal().abs().max() > 1e-9)
    for name, place in ResidualOperator(*of).slices.items():
        if name not in outside:
            assert rest.diagonal()[place].abs().max() < 1e-12


def test_only_what_is_curved_on_any_batch_is_estimated():
    model, (x, y) = late(rare=True), data()
    order = x[:, 0].argsort()
    batches = [(x[i : i + 1], y[i : i + 1]) for i in order]  # the last ones alone are smooth
    assert set(curved(model, batches, dict(model.named_parameters()))) == {"first.weight", "first.bias"}
    assert not curved(model, batches[:1], dict(model.named_parameters()))


@pytest.mark.simulation
def test_its_intervals_cover():
    model, (x, y) = late(), data()
    subject = prepare(model, (x, y))
    of = (model, LOSSES["cross_entropy"], [(x, y)], dict(model.named_parameters()))
    truth = float(HessianOperator(*of).dense().trace())
    found = [split_trace(subject, lambda: subject, "dequantized", 13, 4, seed) for seed in range(200)]
    errors = torch.tensor([one["value"] - truth for one in found])
    sems = torch.tensor([one["sem"] for one in found])
    inside = (errors.abs() <= 2.2 * sems).double().mean()  # Student's t of 11
    assert 0.9 <= inside <= 0.99
    assert errors.mean().abs() < 4 * errors.std() / 200**0.5
    assert all(one["n_products"] == 13 for one in found)


def test_of_a_piecewise_linear_network_nothing_is_left():
    model = tiny(3).double().eval()
    x, y = torch.randn(6, 1, 8, 8).double(), torch.randint(3, (6,))
    split, exact = (hessian_trace(model, (x, y), method=method) for method in ("split", "exact"))
    assert split.value == pytest.approx(exact.value)
    assert split.sem == 0
    assert split.per_layer == pytest.approx(exact.per_layer)


def test_its_estimate_and_what_it_is_not_for():
    model, (x, y) = late(), data()
    found = hessian_trace(model, (x, y), method="split", n_products=40)
    assert sum(found.per_layer.values()) == pytest.approx(found.value)
    assert found.per_layer_sem["head"] == 0 < found.per_layer_sem["first"]
    for options, said in (
        ({"operator": "gauss-newton"}, "for the Hessian"),
        ({"tol": 0.1}, "fixed number"),
        ({"loss": F.multi_margin_loss}, "not known in closed form"),
    ):
        with pytest.raises(UserError, match=said):
            hessian_trace(model, (x, y), method="split", **options)
