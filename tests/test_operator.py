"""Products of the operators against dense matrices, curvlinops and PyHessian; traces from products."""

from __future__ import annotations

import platform

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fpq_analysis import UserError, hessian_trace
from fpq_analysis.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    as_batches,
    per_sample_traces,
)
from fpq_analysis.curvature.memory import freed_memory_kept
from fpq_analysis.curvature.pyhessian_engine import pyhessian_trace_samples
from fpq_analysis.losses.cross_entropy import CROSS_ENTROPY
from fpq_analysis.models import resnet20
from fpq_analysis.probes.subject import prepare
from tests.nets import dense_hessian, networks, tiny


@given(networks())
@settings(max_examples=10)
def test_products_equal_the_dense_hessian(net):
    model, x, y = net
    parameters = dict(model.named_parameters())
    dense = dense_hessian(model, list(parameters.values()), x, y)
    v = torch.randn(3, len(dense), dtype=torch.float64)
    for micro_batch in (1, 2, 100):  # ragged, and whole
        operator = HessianOperator(model, F.cross_entropy, as_batches((x, y), micro_batch), parameters)
        torch.testing.assert_close(operator.products(v), v @ dense, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(operator.matvec(v[0]), dense @ v[0], rtol=1e-10, atol=1e-12)
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
    v = torch.randn(2, ours.size, dtype=torch.float64)
    torch.testing.assert_close(ours.products(v), (theirs @ v.T).T, rtol=1e-10, atol=1e-12)


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
    assert hessian_trace(model, data, method="hutchinson", n_products=5).per_layer["idle"] == 0


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(3, 1).double()
    data = (torch.randn(4, 3, dtype=torch.float64), torch.zeros(4))
    ours = hessian_trace(model, data, loss=lambda z, y: z.mean(), n_products=5)
    assert ours.value == 0


def test_hutchinson_interval_covers_the_dense_trace():
    model = smooth_net()
    x, y = torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.randint(4, (7,))
    truth = float(dense_hessian(model, list(model.parameters()), x, y).trace())
    inside = 0
    for seed in range(60):
        ours = hessian_trace(model, (x, y), method="hutchinson", n_products=30, seed=seed)
        inside += abs(ours.value - truth) < 2.045 * ours.sem  # Student's t, 29 degrees of freedom
    assert inside >= 53  # Binomial(60, 0.95): 52 or fewer has a probability of 1 %


@pytest.mark.parametrize(
    ("method", "tol"), [("hutchinson", 0.2), ("deflated", 0.05), ("hutch++", 0.05), ("xtrace", 0.05)]
)
def test_a_tolerance_is_reached_or_missed_aloud(method, tol, monkeypatch):
    torch.manual_seed(0)
    model = smooth_net()
    data = (torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.randint(4, (7,)))
    ours = hessian_trace(model, data, method=method, tol=tol)
    assert ours.converged
    assert ours.sem <= tol * abs(ours.value)
    assert ours.n_products >= 32
    monkeypatch.setattr("fpq_analysis.probes.trace.MAX_PRODUCTS", 40)
    assert not hessian_trace(model, data, method=method, tol=1e-9).converged


@pytest.mark.parametrize("operator", ["hessian", "gauss-newton", "fisher"])
@pytest.mark.parametrize("method", ["hutchinson", "deflated", "hutch++", "xtrace", "xnystrace"])
def test_layers_add_up_and_agree_with_the_dense_matrix(method, operator):
    if (method, operator) == ("xnystrace", "hessian"):
        pytest.skip("a Hessian is not positive semidefinite")
    torch.manual_seed(0)
    model = smooth_net()
    data = (torch.randn(7, 1, 8, 8).double(), torch.randint(4, (7,)))
    ours = hessian_trace(model, data, method=method, operator=operator, n_products=60)
    assert sum(ours.per_layer.values()) == pytest.approx(ours.value, rel=1e-10)
    matrix = prepare(model, data).operator(operator)
    diagonal = matrix.dense().diagonal()
    assert abs(ours.value - float(diagonal.sum())) < 4 * ours.sem + 1e-6 * abs(ours.value)
    for layer, value in ours.per_layer.items():
        truth = sum(float(diagonal[place].sum()) for name, place in matrix.slices.items() if name.startswith(layer))
        assert abs(value - truth) < 5 * ours.per_layer_sem[layer] + 1e-6 * abs(ours.value)


def test_gauss_newton_equals_curvlinops():
    from curvlinops import GGNLinearOperator

    model = smooth_net()
    x, y = torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.randint(4, (7,))
    parameters = dict(model.named_parameters())
    ours = GaussNewtonOperator(model, F.cross_entropy, as_batches((x, y), 3), parameters)
    theirs = GGNLinearOperator(model, nn.CrossEntropyLoss(), list(parameters.values()), as_batches((x, y), 3))
    v = torch.randn(2, ours.size, dtype=torch.float64)
    torch.testing.assert_close(ours.products(v), (theirs @ v.T).T, rtol=1e-10, atol=1e-12)


@given(networks())
@settings(max_examples=5)
def test_gauss_newton_has_the_diagonal_of_a_piecewise_linear_networks_hessian(net):
    model, x, y = net
    subject = prepare(model, (x, y), micro_batch=3)
    dense = dense_hessian(subject.view, list(subject.parameters.values()), x, y)
    ours = subject.operator("gauss-newton").dense()
    torch.testing.assert_close(ours.diagonal(), dense.diagonal(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, ours.T, rtol=1e-9, atol=1e-12)


def test_fisher_labels_do_not_depend_on_micro_batches_and_average_to_gauss_newton():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    data, parameters = [(x, torch.zeros(6, dtype=torch.long))], dict(model.named_parameters())
    whole = FisherOperator(model, CROSS_ENTROPY, data, parameters, n_labels=3, seed=1).dense()
    parts = FisherOperator(model, CROSS_ENTROPY, as_batches(data, 4), parameters, n_labels=3, seed=1).dense()
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-14)
    many = FisherOperator(model, CROSS_ENTROPY, data, parameters, n_labels=20_000, seed=1).dense()
    truth = GaussNewtonOperator(model, F.cross_entropy, data, parameters).dense()
    torch.testing.assert_close(many, truth, rtol=0, atol=0.03 * float(truth.abs().max()))


def test_operators_speak_scipy():
    from scipy.sparse.linalg import eigsh

    model = smooth_net()
    subject = prepare(model, (torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randint(4, (5,))))
    operator = subject.operator()
    top = eigsh(operator.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(top), torch.linalg.eigvalsh(operator.dense())[-2:].numpy(), rtol=1e-8)


def test_selected_parameters_give_a_block_of_the_matrix():
    model = smooth_net()
    data = (torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randint(4, (5,)))
    whole = prepare(model, data).operator()
    part = prepare(model, data, parameters=["0.*", "*.bias"]).operator()
    assert list(part.slices) == ["0.weight", "0.bias", "2.bias", "4.bias"]
    rows = torch.cat([torch.arange(whole.size)[whole.slices[name]] for name in part.slices])
    torch.testing.assert_close(part.dense(), whole.dense()[rows][:, rows], rtol=1e-10, atol=1e-14)
    with pytest.raises(UserError, match=r"No parameter is called 'O\.weight'"):
        prepare(model, data, parameters="O.weight")


class Hungry(nn.Module):
    """Runs out of memory for more than `most` samples."""

    def __init__(self, most: int, message: str = "DefaultCPUAllocator: can't allocate memory: you tried") -> None:
        super().__init__()
        self.body, self.most, self.message = tiny(4), most, message

    def forward(self, x):
        if len(x) > self.most:
            raise RuntimeError(self.message)
        return self.body(x)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing():
    torch.manual_seed(0)
    hungry = Hungry(3).double().eval()
    x, y = torch.randn(11, 1, 8, 8, dtype=torch.float64), torch.randint(4, (11,))
    parameters = dict(hungry.named_parameters())
    operator = HessianOperator(hungry, F.cross_entropy, [(x, y)], parameters)
    v = torch.randn(2, operator.size, dtype=torch.float64)
    truth = HessianOperator(hungry.body, F.cross_entropy, [(x, y)], parameters).products(v)
    for _ in range(2):  # the second time starts with what fitted
        torch.testing.assert_close(operator.products(v), truth, rtol=1e-10, atol=1e-12)
    assert [len(batch[0]) for batch in operator.batches] == [3, 3, 3, 2]
    for n_labels in (None, 2):
        found = []
        for hungry.most in (3, 100):
            generator = torch.Generator().manual_seed(0)
            parts = per_sample_traces(
                hungry, CROSS_ENTROPY, [(x, y)], parameters, n_labels=n_labels, generator=generator
            )
            found.append(torch.cat([part["body.0.weight"] for part in parts], 1))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("room", [None, 0.5, 0])
def test_graphs_are_kept_as_far_as_memory_goes(room, monkeypatch):
    """And dropped where it runs out; the product is the same."""
    torch.manual_seed(0)
    model = tiny(4).double().eval()
    x, y = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.randint(4, (20,))
    data = list(zip(x.split(5), y.split(5), strict=True))
    parameters = dict(model.named_parameters())
    roomy = HessianOperator(model, F.cross_entropy, data, parameters)
    v = torch.randn(roomy.size, dtype=torch.float64)
    truth = roomy.matvec(v)
    limit = None if room is None else int(room * roomy.graph_bytes)
    operator = HessianOperator(model, F.cross_entropy, data, parameters, graph_bytes=limit)
    built = []
    build = operator._graph
    monkeypatch.setattr(operator, "_graph", lambda batch: built.append(batch) or build(batch))
    for _ in range(2):
        assert torch.equal(operator.matvec(v), truth)
    assert len(built) == {None: 4, 0.5: 2 + 2 * 2, 0: 8}[room]
    assert operator.graph_bytes <= (roomy.graph_bytes if limit is None else limit)

    product = operator._product
    failing = iter([True])
    monkeypatch.setattr(
        operator, "_product", lambda *args: product(*args) if not next(failing, False) else _out_of_memory()
    )
    before = operator.graph_bytes
    torch.testing.assert_close(operator.matvec(v), truth, rtol=1e-12, atol=1e-14)
    assert [len(x) for x, _ in operator.batches] == [3, 2, 3, 2, 3, 2, 3, 2]
    assert operator.graph_bytes <= before / 2


def test_graphs_are_charged_for_what_they_save_and_not_for_the_weights():
    """A linear layer of a million weights, and one image: what its graph saves is some vectors."""
    model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 3))
    operator = HessianOperator(
        model, F.cross_entropy, [(torch.randn(1, 1000), torch.tensor([0]))], dict(model.named_parameters())
    )
    operator.matvec(torch.randn(operator.size))
    assert 4 * 1000 <= operator.graph_bytes <= 4 * 50_000


def _out_of_memory():
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_no_memory_for_one_sample_is_an_error_and_other_errors_pass():
    data = (torch.randn(4, 1, 8, 8), torch.randint(4, (4,)))
    model = Hungry(0)
    operator = HessianOperator(model, F.cross_entropy, [data], dict(model.named_parameters()))
    with pytest.raises(UserError, match="not enough memory for a single sample"):
        operator.matvec(torch.zeros(operator.size))
    model.message = "shapes do not fit"
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        operator.matvec(torch.zeros(operator.size))


def test_fused_attention_is_measured():
    """It has no second derivative of its own; the plain form is taken."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).double().eval()
    data = (torch.randn(4, 3, 8, dtype=torch.float64), torch.randint(3, (4,)))
    operator = prepare(model, data).operator()
    u, v = torch.randn(2, operator.size, dtype=torch.float64)
    assert float(u @ operator.matvec(v)) == pytest.approx(float(v @ operator.matvec(u)), rel=1e-10)
    assert hessian_trace(model, data, n_products=20).method == "deflated"


@pytest.mark.parametrize("micro_batch", [3, 100])
def test_pyhessian_agrees(micro_batch):
    model = tiny(4).double().eval()
    data = (torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(4, (8,)))
    exact = hessian_trace(model, data, method="exact")
    theirs = hessian_trace(model, data, method="pyhessian", n_products=150, micro_batch=micro_batch)
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
        hessian_trace(Unused(), (torch.randn(5, 4), torch.randint(3, (5,))), method="pyhessian", n_products=2)


def test_same_seed_same_numbers():
    model = smooth_net()
    data = (torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.randint(4, (7,)))
    a, b, c = (hessian_trace(model, data, n_products=10, seed=seed) for seed in (0, 0, 1))
    assert a.value == b.value
    assert a.value != c.value
    assert np.isnan(a.sem_data)
    assert a.error == a.sem


def test_a_real_resnet20_agrees_with_curvlinops():
    from curvlinops import HessianLinearOperator

    model = resnet20(10, 1).double()
    x, y = torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.randint(10, (12,))
    with torch.no_grad():
        model(x)  # BatchNorm statistics other than the initial ones
    subject = prepare(model, (x, y), micro_batch=5)
    ours, parameters = subject.operator(), list(subject.parameters.values())
    theirs = HessianLinearOperator(subject.view, nn.CrossEntropyLoss(), parameters, subject.data)
    v = torch.randn(2, ours.size, dtype=torch.float64)
    torch.testing.assert_close(ours.products(v), (theirs @ v.T).T, rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_goes_back_at_the_end_of_the_outermost():
    process = psutil.Process()
    with freed_memory_kept():
        with freed_memory_kept():
            held = [torch.ones(2**18) for _ in range(200)]  # a MB each, on the heap
            most = process.memory_info().rss
            held.clear()
        inside = process.memory_info().rss
    after = process.memory_info().rss
    assert after < most - 2**26
    assert after <= inside


def test_blocks_that_are_run_again_in_the_backward_pass():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh())
            self.head = nn.Linear(12, 3)

        def forward(self, x):
            return self.head(checkpoint(self.block, x, use_reentrant=False).flatten(1))

    torch.manual_seed(0)
    model = Checkpointed().double().eval()
    x, y = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randint(3, (5,))
    parameters = dict(model.named_parameters())
    dense = dense_hessian(model, list(parameters.values()), x, y)
    operator = HessianOperator(model, CROSS_ENTROPY, as_batches((x, y), 2), parameters)
    v = torch.randn(2, len(dense), dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(operator.products(v), v @ dense, rtol=1e-10, atol=1e-12)
