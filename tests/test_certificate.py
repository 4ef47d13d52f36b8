"""The certificate of the exact trace: nothing bent is certified, whatever hides it, and what is piecewise linear is."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fpq_analysis import QuantSpec, UserError, calibrate, hessian_trace, noise_response, quantize
from fpq_analysis.curvature import NotExactError, certify, per_sample_traces
from fpq_analysis.curvature.certificate import certify_features
from fpq_analysis.curvature.functions import _bends, fault_of_function
from fpq_analysis.losses.cross_entropy import CROSS_ENTROPY
from fpq_analysis.quantizers.fake_quantize import FusedFakeQuantize
from tests.hidden import AT_FIRST, BENT, PIECEWISE, Op, Times, network
from tests.nets import dense_hessian, tiny
from tests.results import table_of


def reason(model, x, parameters=None):
    """Why the model is not certified; empty if it is."""
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    parameters = parameters or dict(model.named_parameters())
    try:
        certify(model.eval(), data, parameters)
        list(per_sample_traces(model, CROSS_ENTROPY, data, parameters))
    except NotExactError as error:
        return str(error)
    return ""


def inputs(n=16, size=1.0):
    return size * torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


def smooth(act, scale=1.0, seed=0):
    """An activation behind weights of a given size and a bias of zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[0].weight *= scale
        model[0].bias.zero_()
    return model


# A trial by numbers passed them as exact: 1.547 (truth 2.611), 0.970 (0.523), 1.094 (0.689), 0.720 (0.665), 2.534
# (-16.845).
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (smooth(nn.GELU(), seed=22).bfloat16(), inputs().bfloat16()),
        (smooth(nn.SiLU(), 0.1, seed=23).half(), inputs().half()),
        (smooth(nn.GELU(), 1e-6), inputs()),
        (smooth(nn.GELU()), inputs(size=1e-6)),
        (smooth(nn.Softplus(beta=1e4), seed=13).double(), inputs(64).double()),
    ],
    ids=["bfloat16", "half", "tiny weights", "tiny inputs", "rare bend"],
)
def test_bends_that_numbers_do_not_show(model, x):
    y = torch.arange(len(x)) % 3
    name = type(model[1]).__name__.lower()
    with pytest.raises(UserError, match=rf"'{name}' in '1' \(\w+\).*'0\.weight'"):
        hessian_trace(model, (x, y), method="exact")
    ours = hessian_trace(model, (x, y), n_products=60)
    assert ours.method == "deflated"
    assert f"'{name}'" in ours.reason
    if x.dtype not in (torch.bfloat16, torch.half):
        wide = copy.deepcopy(model).double()
        truth = float(dense_hessian(wide, list(wide.parameters()), x.double(), y).trace())
        assert ours.value == pytest.approx(truth, abs=4 * ours.sem + 1e-5 * abs(truth))


def test_an_operation_in_place_elsewhere_gives_its_name_to_no_other():
    """RReLU writes its noise, without a gradient, just before the next node is made."""
    model = nn.Sequential(nn.Linear(6, 6), PIECEWISE["Clip"](), nn.RReLU(), nn.CELU(), nn.Linear(6, 3)).double()
    assert "'celu' in '3' (CELU)" in reason(model, inputs().double())


def test_squares_that_overflow_are_no_reason():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    assert reason(model, inputs(size=1e25)) == ""


@pytest.mark.parametrize("seeds", [range(i, i + 50) for i in range(0, 200, 50)], ids=str)
def test_random_networks(seeds):
    """`benchmarks/certificate.py` does thousands."""
    for seed in seeds:
        model, x, y, bend = network(seed)
        parameters = dict(model.named_parameters())
        if bend:
            with pytest.raises(NotExactError):
                certify(model, [(x, y)], parameters)
            continue
        certify(model, [(x, y)], parameters)
        if x.dtype == torch.float64 and "cast" not in [getattr(module, "name", "") for module in model]:
            value = float(
                sum(t.mean() for t in next(per_sample_traces(model, CROSS_ENTROPY, [(x, y)], parameters)).values())
            )
            with suppress(RuntimeError):  # torch has no second derivative of hardsigmoid
                truth = float(dense_hessian(model, list(parameters.values()), x, y).trace())
                assert value == pytest.approx(truth, rel=1e-10, abs=0)


@pytest.mark.parametrize("name", sorted(BENT))
def test_every_bend_is_found(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), BENT[name](), nn.Linear(6, 3)).eval()
    model(torch.randn(2, 6))
    assert reason(model.double(), inputs().double())


@pytest.mark.parametrize("name", sorted(PIECEWISE))
def test_everything_piecewise_linear_is_certified(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), PIECEWISE[name](), nn.Linear(6, 3)).eval()
    model(torch.randn(2, 6))
    assert reason(model.double(), inputs().double()) == ""


@pytest.mark.parametrize("name", sorted(AT_FIRST))
def test_products_of_what_shares_no_variable_are_certified(name):
    torch.manual_seed(0)
    model = nn.Sequential(AT_FIRST[name](), nn.Linear(6, 3)).double()
    assert reason(model, inputs().double()) == ""


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (BENT["own gate"](), "'mul' in '1' (Op) multiplies two factors that both depend on '0.weight'"),
        (BENT["quotient"](), "'div' in '1' (Op) is not linear in its operand 2, which depends on '0.weight'"),
        (BENT["layer_norm"](), "'native_layer_norm' in '1' (Op) is not known to be piecewise linear"),
        (BENT["slice tanh_"](), "'tanh' in '1' (Op)"),
        (BENT["SharpSoftplus"](), "the Function 'SharpSoftplus' in '1' (Op) is curved in what depends on '0.weight'"),
        (BENT["complex"](), "a complex number in '1' (Op)"),
        (nn.LogSoftmax(1), "'log_softmax' in '1' (LogSoftmax)"),
        (nn.BatchNorm1d(6, track_running_stats=False, affine=False), "'native_batch_norm' in '1' (BatchNorm1d)"),
        (Op(lambda x: checkpoint(F.gelu, x, use_reentrant=False)), "'gelu' in '1' (Op)"),
        (Op(lambda x: checkpoint(F.relu, x, use_reentrant=True)), "a checkpointed part"),
        (Op(torch.jit.trace(torch.tanh, torch.zeros(2, 6, dtype=torch.float64))), "'tanh' in '1' (Op)"),
    ],
)
def test_the_reason_names_operation_module_and_variable(act, why):
    model = nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 3)).double()
    assert why in reason(model, inputs().double())


def test_compiled_parts():
    """By the name of their node, without a compiler."""
    compiled = type("CompiledFunction", (PIECEWISE["Clip"]().function.__self__,), {})
    model = nn.Sequential(nn.Linear(6, 6), Op(compiled.apply), nn.Linear(6, 3)).double()
    assert "a compiled part (torch.compile) in '1' (Op) does not show its operations" in reason(
        model, inputs().double()
    )


class Branching(nn.Module):
    """A bend for large inputs only."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h.tanh() if x.abs().max() > 5 else h.relu())


def test_another_way_through_the_model_on_a_later_batch():
    model, x = Branching().double(), inputs(32).double().clamp(-4, 4)
    y, parameters = torch.arange(32) % 3, dict(model.named_parameters())
    certify(model, [(x, y), (x + 6, y)], parameters)  # of the first batch
    assert len(list(per_sample_traces(model, CROSS_ENTROPY, [(x, y), (x, y)], parameters))) == 2
    with pytest.raises(NotExactError, match="'tanh'"):
        list(per_sample_traces(model, CROSS_ENTROPY, [(x, y), (x + 6, y)], parameters))


class Shared(nn.Module):
    """A weight used again where the images tried are blind: the gradient there is that of the layer alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.layer(x) + F.linear((x - 50).relu(), self.layer.weight)


def test_a_weight_used_twice_is_found_without_an_image_that_shows_it():
    assert reason(Shared(), inputs()) == "'layer.weight' is used more than once in a forward pass"


def test_held_parameters_may_bend():
    """Only the variables count: the same network is certified for what comes behind the bend."""
    model = smooth(nn.GELU())
    assert "'gelu'" in reason(model, inputs())
    behind = {name: p for name, p in model.named_parameters() if name.startswith("2")}
    assert reason(model, inputs(), behind) == ""
    assert all(p.requires_grad for p in model.parameters())


def test_a_function_curved_in_another_argument_only():
    """Of the product of two inputs one may depend on the variable."""
    model = nn.Sequential(nn.Linear(6, 6), Op(lambda x: Times.apply(x, torch.ones_like(x))), nn.Linear(6, 3)).double()
    assert reason(model, inputs().double()) == ""


def test_functions_that_cannot_be_tried_are_refused():
    class Picky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, grad):
            return grad

    model = nn.Sequential(nn.Linear(6, 6), Op(Picky.apply), nn.Linear(6, 3))
    assert "cannot be tried out in float64 (TypeError: float32 only)" in reason(model, inputs())


def test_features_as_variables():
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    model = quantize(tiny(4), QuantSpec.parse("W4A4"))
    calibrate(model, x, "mse")
    model.eval()
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    data = [(x, torch.zeros(4, dtype=torch.long))]
    certify_features(model, data, convolutions)
    for bend in (nn.Tanh(), Op(lambda h: h * h.flip(1))):
        bent = copy.deepcopy(model)
        bent[2] = bend
        certify_features(bent, data, {"3": bent[3]})
        with pytest.raises(NotExactError, match=r"in '2' \(\w+\) .* the input of '0'"):
            certify_features(bent, data, {"0": bent[0]})
        found = table_of(noise_response, bent, data[0], sizes=[1], n_draws=2)
        assert set(found["estimator"].dropna()) & {"hutchinson", "exact"} == {"hutchinson"}


@pytest.mark.parametrize("levels", [3, 15])
def test_what_the_fake_quantizer_declares_is_so(levels):
    torch.manual_seed(0)
    call = (3 * torch.randn(40), torch.tensor(0.3), torch.tensor(float(levels // 2)), levels)
    assert FusedFakeQuantize.piecewise_linear_in == (0,)
    assert not _bends(FusedFakeQuantize, call, (0,))


def test_a_function_is_taken_at_its_word_along_what_it_names_alone():
    class Product(torch.autograd.Function):
        piecewise_linear_in = (0,)

        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            return g * y, g * x

    call = (torch.randn(3), torch.randn(3))
    assert fault_of_function(Product, call, [1, 0]) is None
    assert fault_of_function(Product, call, [1, 2]) is None  # linear in each alone
    assert fault_of_function(Product, call, [1, 1]) is not None  # but not in one variable that is in both
