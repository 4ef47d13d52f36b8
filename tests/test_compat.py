"""The drop-in for PyHessian's class: its shapes, dense numbers, and a model left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fpq_analysis import QuantSpec, UserError, calibrate, quantize
from fpq_analysis.compat import pyhessian as ours_of
from fpq_analysis.compat.pyhessian import get_params, hessian
from tests.nets import dense_hessian, tiny


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


def random_vector(params):
    return [torch.randn_like(p) for p in params]


def flat(parts):
    return torch.cat([part.detach().flatten() for part in parts])


@pytest.mark.parametrize("form", ["data", "dataloader"])
def test_products_by_hand_are_those_of_pyhessian_and_of_the_dense_hessian(case, form):
    pyhessian = pytest.importorskip("pyhessian")
    model, data, dense = case
    loader = [(data[0][:13], data[1][:13]), (data[0][13:], data[1][13:])]
    given = {"data": data} if form == "data" else {"dataloader": loader}
    ours = hessian(model, nn.CrossEntropyLoss(), cuda=False, **given)
    assert [p is q for p, q in zip(ours.params, model.parameters(), strict=True)] == [True] * 4
    v = random_vector(ours.params)
    truth = dense @ flat(v)
    torch.testing.assert_close(flat(ours_of.hessian_vector_product(ours.gradsH, ours.params, v)), truth)
    value, product = ours.dataloader_hv_product(v)
    torch.testing.assert_close(flat(product), truth)
    assert value == pytest.approx(float(flat(v) @ truth)) == pytest.approx(float(ours_of.group_product(v, product)))
    torch.testing.assert_close(
        flat(ours.gradsH), flat(torch.autograd.grad(nn.functional.cross_entropy(model(data[0]), data[1]), ours.params))
    )
    assert all(p.grad is None for p in model.parameters())
    theirs = pyhessian.hessian(model, nn.CrossEntropyLoss(), cuda=False, **given)
    if form == "data":
        torch.testing.assert_close(flat(ours.gradsH), flat(theirs.gradsH))
        torch.testing.assert_close(flat(pyhessian.hessian_vector_product(theirs.gradsH, theirs.params, v)), truth)
    else:
        other, moved = theirs.dataloader_hv_product(v)
        assert value == pytest.approx(other)
        torch.testing.assert_close(flat(product), flat(moved))


def test_a_script_of_its_own_products_and_ours_of_pyhessians_tools():
    """Power iteration as such scripts write it, from `loss.backward(create_graph=True)`."""
    pyhessian = pytest.importorskip("pyhessian")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
    spectrum = torch.linalg.eigvalsh(dense_hessian(model, list(model.parameters()), x, y))
    found = []
    for tools in (pyhessian, ours_of):
        torch.manual_seed(2)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward(create_graph=True)
        params, gradients = tools.get_params_grad(model)
        known = []
        for _ in range(2):
            v = tools.normalization(random_vector(params))
            for _ in range(300):
                v = tools.orthnormal(v, known)
                product = tools.hessian_vector_product(gradients, params, v)
                value = float(tools.group_product(product, v))
                v = tools.normalization(product)
            known.append(v)
            found.append(value)
    model.zero_grad()
    assert found[2:] == pytest.approx(found[:2], rel=1e-4)
    top = spectrum[spectrum.abs().argsort(descending=True)][:2]
    assert found[2:] == pytest.approx(top.tolist(), rel=1e-4)
    a, b = [torch.ones(2), torch.zeros(3)], [torch.full((2,), 2.0), torch.ones(3)]
    assert ours_of.group_add(a, b, alpha=0.5) is a
    assert flat(a).tolist() == [2, 2, 0.5, 0.5, 0.5]
    assert flat(ours_of.normalization([torch.zeros(2)])).tolist() == [0, 0]


def test_nothing_is_computed_before_it_is_asked_for_and_a_moved_model_is_seen(case):
    model, data, _ = case
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    ours = hessian(model, nn.CrossEntropyLoss(), data=data)
    assert not calls
    first = ours.gradsH
    assert ours.gradsH is first
    v = random_vector(ours.params)
    before, _ = ours.dataloader_hv_product(v)
    for p in ours.params:
        p.data.add_(0.1 * torch.randn_like(p))
    dense = dense_hessian(model, list(model.parameters()), *data)
    value, _ = ours.dataloader_hv_product(v)
    assert value != before
    assert value == pytest.approx(float(flat(v) @ dense @ flat(v)))
    torch.testing.assert_close(flat(ours_of.hessian_vector_product(ours.gradsH, ours.params, v)), dense @ flat(v))


def test_parameters_that_the_loss_does_not_bend():
    """Unused ones, and some without a second derivative, have zeros where PyHessian stops."""
    model = nn.Linear(4, 1).double()
    model.idle = nn.Linear(2, 2).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.zeros(6)
    for loss in (lambda z, _: z.square().mean(), lambda z, _: z.mean()):
        ours = hessian(model, loss, data=(x, y))
        v = random_vector(ours.params)
        dense = torch.autograd.functional.hessian(
            lambda w, loss=loss: loss(x @ w[:4] + w[4], y), torch.cat([model.weight[0], model.bias]).detach()
        )
        truth = torch.cat([dense @ flat(v)[:5], torch.zeros(6)])
        torch.testing.assert_close(flat(ours_of.hessian_vector_product(ours.gradsH, ours.params, v)), truth)
        torch.testing.assert_close(flat(ours.dataloader_hv_product(v)[1]), truth)


def test_of_a_quantized_network_all_are_of_one_matrix():
    model = quantize(tiny(4), QuantSpec.parse("W4A4"))
    x, y = torch.randn(12, 1, 8, 8), torch.randint(4, (12,))
    calibrate(model, x, "mse")
    ours = hessian(model.double(), nn.CrossEntropyLoss(), data=(x.double(), y))
    values, vectors = ours.eigenvalues(tol=1e-8)
    assert [v.shape for v in vectors[0]] == [p.shape for p in ours.params]
    value, product = ours.dataloader_hv_product(vectors[0])
    assert value == pytest.approx(values[0], rel=1e-6)
    torch.testing.assert_close(
        flat(ours_of.hessian_vector_product(ours.gradsH, ours.params, vectors[0])), flat(product)
    )


def test_the_public_example_with_only_its_imports_changed(tmp_path):
    """Its steps, on a small network in `DataParallel`, as there: numbers as PyHessian's to that one's error."""
    pyhessian = pytest.importorskip("pyhessian")
    torch.manual_seed(3)
    model = nn.DataParallel(tiny(4)).eval()
    data = (torch.randn(24, 1, 8, 8), torch.randint(4, (24,)))
    found = {}
    for name, kind in (("theirs", pyhessian.hessian), ("ours", hessian)):
        hessian_comp = kind(model, nn.CrossEntropyLoss(), data=data, cuda=False)
        top_eigenvalues, _ = hessian_comp.eigenvalues()
        found[name] = top_eigenvalues[-1], hessian_comp.trace(maxIter=50, tol=0)
    density_eigen, density_weight = hessian_comp.density(iter=20)
    ours_of.get_esd_plot(density_eigen, density_weight)
    assert [path.name for path in tmp_path.iterdir()] == ["example.pdf"]
    assert (tmp_path / "example.pdf").read_bytes().startswith(b"%PDF")
    draws = np.array(found["theirs"][1])
    assert found["ours"][0] == pytest.approx(found["theirs"][0], rel=0.02)
    assert abs(np.mean(found["ours"][1]) - draws.mean()) < 4 * draws.std(ddof=1) / len(draws) ** 0.5
    assert max(density_eigen[0]) == pytest.approx(found["ours"][0], rel=0.01)
