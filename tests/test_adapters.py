"""Other programs' quantized networks, against the same networks written by hand, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from fpq_analysis import hessian_eigs, hessian_trace
from fpq_analysis.probes.subject import prepare
from fpq_analysis.quantizers import DEFINITIONS, adopt, clipped_fraction
from tests import foreign_nets
from tests.nets import dense_hessian

X, Y = foreign_nets.X.double(), foreign_nets.Y
FRONT_ENDS = {
    "torch.ao": foreign_nets.torch_ao,
    "FX": foreign_nets.torch_ao_fx,
    "learnable": foreign_nets.torch_ao_learnable,
    "plain": foreign_nets.torch_ao_plain,
    "torchao": foreign_nets.torchao,
    "torchao, learned": lambda: foreign_nets.torchao(learned=True),
    "Brevitas": foreign_nets.brevitas,
}
every_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


def build(front_end):
    if front_end.startswith(("torchao", "Brevitas")):
        pytest.importorskip(front_end.split(",")[0].lower())
    return FRONT_ENDS[front_end]()


@every_front_end
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_curvature_is_that_of_the_network_written_by_hand(front_end, definition):
    pair = build(front_end)
    model = copy.deepcopy(pair.model).double()
    hand = pair.by_hand(definition)
    assert 0.4 < hand.clipped_fraction() < 0.75
    subject = prepare(model, (X, Y), definition=definition)
    assert subject.fit.loss == pytest.approx(float(torch.nn.functional.cross_entropy(hand(X), Y)), rel=1e-10)
    own = [hand.named[name] for name in subject.parameters]
    assert len(own) == len(hand.named)
    dense = dense_hessian(hand, own, X, Y)
    size = dense.abs().max()
    found = subject.operator().dense()
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-8 * size)
    trace = hessian_trace(model, (X, Y), definition=definition, n_products=60)
    if front_end == "Brevitas" and definition == "latent":  # dQ/dw is no mask
        assert abs(trace.value - float(dense.trace())) < 5 * trace.sem + 1e-8 * float(size)
    else:
        assert trace.method == "exact"
        assert trace.value == pytest.approx(float(dense.trace()), rel=1e-8)
    assert trace.clipped_fraction == pytest.approx(hand.clipped_fraction(), abs=1e-12)
    eigenvalues = torch.linalg.eigvalsh(dense)
    for which, truth in (("LA", eigenvalues.flip(0)[:2]), ("SA", eigenvalues[:1])):
        ours = hessian_eigs(model, (X, Y), len(truth), which=which, definition=definition, tol=1e-6)
        torch.testing.assert_close(torch.tensor(ours.values), truth, rtol=1e-8, atol=1e-8 * float(size))


@every_front_end
def test_the_three_definitions_are_three_numbers(front_end):
    model = build(front_end).model
    numbers = sorted(hessian_trace(model, (X.float(), Y), definition=d).value for d in DEFINITIONS)
    assert numbers[0] < 0.999 * numbers[1] < 0.998 * numbers[2]


@every_front_end
def test_the_adopted_network_is_a_copy_that_computes_the_same(front_end):
    model = build(front_end).model
    before = copy.deepcopy(model.state_dict())
    adopted = adopt(model, X.float())
    torch.testing.assert_close(adopted(X.float()), model(X.float()), rtol=0, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert adopt(adopted) is adopted
    assert 0.4 < clipped_fraction(adopted) < 0.75
