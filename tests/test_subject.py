"""What has no Hessian that is a mean over samples is refused, by its name and with its cure; what has one is not."""

from __future__ import annotations

import copy
import functools
import math

import pandas as pd
import pytest
import torch
import torch.ao.quantization as ao
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, weight_norm

from fpq_analysis import (
    QuantSpec,
    UserError,
    calibrate,
    feature_drift,
    feature_statistics,
    hessian_trace,
    landscape,
    noise_response,
    oscillation,
    output_variance,
    quantize,
)
from fpq_analysis.cli.hessian import print_traces
from fpq_analysis.doctor import diagnose
from fpq_analysis.losses import check_mean
from fpq_analysis.probes import HessianTrace, Point, gradient_norms, hessian_eigs, sharpness, spectral_density
from fpq_analysis.quantizers import clipped_fraction, rounded_weight
from tests.nets import dense_hessian, networks, tiny

X, Y = torch.randn(20, 6, generator=torch.Generator().manual_seed(3)), torch.arange(20) % 3
FEW = {"n_products": 8}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def dense(model, loss=F.cross_entropy, x=X, y=Y):
    """The trace in float64, a row of double backward each."""
    model = copy.deepcopy(model).double()
    own = list(model.parameters())
    with torch.enable_grad():
        slopes = torch.autograd.grad(loss(model(x.double()), y), own, create_graph=True)
        total = 0.0
        for slope, p in zip(slopes, own, strict=True):
            for i, g in enumerate(slope.reshape(-1)):
                if g.requires_grad:
                    h = torch.autograd.grad(g, p, retain_graph=True, allow_unused=True)[0]
                    total += 0.0 if h is None else float(h.reshape(-1)[i])
    return total


class Scaled(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return super().forward(3 * outputs, targets)


class Focal(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        each = F.cross_entropy(outputs, targets, reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


MEANS = {
    "subclass": Scaled(),
    "focal": Focal(),
    "smoothed": lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1),
    "partial": functools.partial(lambda o, t, scale: F.cross_entropy(scale * o, t), scale=2.0),
    "weighted": lambda o, t: F.cross_entropy(o, t, weight=torch.tensor([1.0, 2.0, 3.0]).to(o), reduction="none").mean(),
    "squares": lambda o, t: F.mse_loss(o, F.one_hot(t, 3).to(o)),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_loss_is_taken_for_what_it_computes(name):
    model = net().double()
    found = hessian_trace(model, (X.double(), Y), loss=MEANS[name], n_products=400)
    truth = dense(model, MEANS[name])
    assert found.method == "deflated"
    assert abs(found.value - truth) < 5 * found.sem + 1e-9 * abs(truth)


@pytest.mark.parametrize("micro_batch", [None, 1, 7])
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "reduction='mean'"),
        (lambda o, t: F.cross_entropy(o, t, ignore_index=1), "ignore_index=i"),
        (lambda o, t: F.cross_entropy(o, t, torch.tensor([1.0, 2.0, 3.0]).to(o)), "weight=w"),
        (nn.CrossEntropyLoss(reduction="none"), "its mean over the batch"),
        (lambda o, t: (o.argmax(1) == t).float().mean(), "cannot be differentiated"),
        (lambda o, t: float(o.mean()), "as a tensor"),
        (lambda o, t: F.cross_entropy(o * torch.rand(()), t), "another number each time"),
        (lambda o, t: F.cross_entropy(o, t.fill_(0)), "changes its outputs or targets in place"),
        (lambda o, t: F.cross_entropy(o.mul_(2), t), "changes its outputs or targets in place"),
        (lambda o, t: F.cross_entropy(o, t).to(torch.complex64), "complex64, not one real number"),
        (lambda o, t: F.mse_loss(o, t.double()), "cannot be computed"),
        (lambda o, t: F.cross_entropy(o, t) + o.var(0).mean() - o.var(0).mean().detach(), "mean of its samples"),
    ],
)
def test_a_loss_that_is_no_mean_over_samples_is_refused(loss, said, micro_batch):
    targets = Y.clone()
    with pytest.raises(UserError, match=said):
        hessian_trace(net(), (X, targets), loss=loss, micro_batch=micro_batch, **FEW)
    assert torch.equal(targets, Y)


def test_unknown_targets_that_a_loss_fills_in_are_not_taken_for_known_ones():
    def masked(outputs, targets):
        known = ~targets.isnan()
        targets[~known] = 0.0
        return ((outputs - targets).square() * known).mean()

    targets = torch.randn(len(X), 3)
    targets[::2] = torch.nan
    with pytest.raises(UserError, match="in place"):
        hessian_trace(net(), (X, targets), loss=masked, **FEW)
    assert hessian_trace(net(), (X, targets), loss=lambda z, y: masked(z, y.clone()), **FEW)


def test_one_ignored_sample_among_many_shows():
    y = torch.zeros(300, dtype=torch.long)
    y[211] = 1
    with pytest.raises(UserError, match="give the module itself"):
        hessian_trace(net(), (torch.randn(300, 6), y), loss=lambda o, t: F.cross_entropy(o, t, ignore_index=1), **FEW)


def test_sample_losses():
    z = torch.randn(5, 3)
    found = check_mean(MEANS["focal"], z, Y[:5])
    expected = torch.stack([MEANS["focal"](z[i : i + 1].double(), Y[i : i + 1]) for i in range(5)])
    assert torch.equal(found, expected)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return (8 * w).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Detached(nn.Module):
    """Straight-through in plain operations, and clipped."""

    def forward(self, w):
        clipped = w.clamp(-0.2, 0.2)
        return clipped + ((10 * clipped).round() / 10 - clipped).detach()


class Sign(nn.Module):
    """Not piecewise constant, for the scale is a mean; its gradient is no derivative either."""

    def forward(self, w):
        return w.abs().mean() * (w + (w.sign() - w).detach())


class RoundedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, Round.apply(self.weight), self.bias)


def by_function():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), RoundedLinear(5, 3)).eval()


def by_parametrization(kind=Detached):
    model = net()
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", kind())
    return model


def by_torch_ao(share=0.6):
    """Weights in int8 in a range that clips `share` of them, activations too; observers are off."""
    model = net().train()
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    ao.prepare_qat(model, inplace=True)
    model(X)
    model.eval().apply(ao.disable_observer)
    for layer in (model[0], model[2]):
        limit = float(torch.quantile(layer.weight.detach().abs(), 1 - share))
        observer = layer.weight_fake_quant.activation_post_process  # the scale is worked out of these each time
        observer.min_val.fill_(-limit)
        observer.max_val.fill_(limit)
    return model


@pytest.mark.parametrize("build", [by_function, by_parametrization, lambda: by_parametrization(Sign)])
def test_quantizers_of_others_have_a_latent_hessian_only(build):
    model = build()
    for definition in ("dequantized", "float"):
        for measure in (hessian_trace, hessian_eigs, spectral_density, gradient_norms):
            with pytest.raises(UserError, match="definition='latent'"):
                measure(model, (X, Y), definition=definition)
    found = hessian_trace(model, (X, Y), definition="latent", n_products=200)
    assert found.definition == "latent"
    assert found.method == "deflated"
    assert "not of this package" in found.reason
    assert math.isnan(found.clipped_fraction)
    assert math.isnan(hessian_eigs(model, (X, Y), 1, definition="latent").clipped_fraction)
    own = [p for p in model.parameters() if p.requires_grad]
    truth = float(dense_hessian(model, own, X, Y).trace())
    assert abs(found.value - truth) < 5 * found.sem + 1e-4 * abs(truth)


def test_the_three_definitions_of_a_torch_ao_network_are_three_numbers():
    model = by_torch_ao()
    baked, plain = by_torch_ao(), by_torch_ao().apply(ao.disable_fake_quant)
    for i in (0, 2):
        with torch.no_grad():
            baked[i].weight.copy_(model[i].weight_fake_quant(model[i].weight))
        baked[i].weight_fake_quant.disable_fake_quant()
    networks = {"float": plain, "dequantized": baked, "latent": model}
    for definition, network in networks.items():
        truth = float(dense_hessian(network, list(network.parameters()), X, Y).trace())
        found = hessian_trace(model, (X, Y), definition=definition)
        assert found.method == "exact"
        assert found.value == pytest.approx(truth, rel=1e-5)
        assert found.clipped_fraction == pytest.approx(0.6, abs=0.1)


def test_observers_are_frozen_in_the_copy():
    model = by_torch_ao()
    frozen = hessian_trace(model, (X, Y)).value
    model.apply(ao.enable_observer)
    model.train()
    state = copy.deepcopy(model.state_dict())
    assert hessian_trace(model, (X, Y)).value == frozen
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert diagnose(model, (X, Y)).set_index("check").loc["quantizers", "status"] == "note"  # many are clipped
    model.apply(ao.disable_fake_quant)  # a float network again
    assert hessian_trace(model, (X, Y)).value == pytest.approx(
        hessian_trace(model, (X, Y), definition="float").value, rel=1e-5
    )


def test_the_doctor_names_a_weight_that_is_rounded():
    row = diagnose(by_function(), (X, Y)).set_index("check").loc["rounding"]
    assert row["status"] == "note"
    assert "'2.weight'" in row["finding"]
    assert "latent" in row["cure"]


def test_rounded_activations_leave_the_weights_plain():
    class Activation(nn.Module):
        def forward(self, x):
            return Round.apply(x)

    model = nn.Sequential(nn.Linear(6, 5), Activation(), nn.Linear(5, 3)).eval()
    dequantized, latent = (hessian_trace(model, (X, Y), definition=d) for d in ("dequantized", "latent"))
    assert dequantized.value == pytest.approx(latent.value, rel=1e-5)
    with pytest.raises(UserError, match="activations are rounded"):
        hessian_trace(model, (X, Y), definition="float")


class Named(nn.Module):
    """Stands in for a class of a package that is not installed."""

    def forward(self, w):
        return w


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torchao.quantization.qat.fake_quantizer", "IntxFakeQuantizer"),
        ("brevitas.proxy.parameter_quant", "WeightQuantProxyFromInjector"),
        ("modelopt.torch.quantization.nn.modules.tensor_quantizer", "TensorQuantizer"),
    ],
)
def test_other_packages_are_recognised_by_the_names_of_their_classes(module, name):
    model = net()
    model[0].weight_quantizer = type("Own", (type(name, (Named,), {"__module__": module}),), {})()
    for definition in ("dequantized", "float"):
        with pytest.raises(UserError, match=r"'0\.weight_quantizer' is a quantizer of"):
            hessian_trace(model, (X, Y), definition=definition)
    model[0].weight_quantizer.enabled = False
    assert hessian_trace(model, (X, Y)).method == "exact"


@pytest.mark.parametrize("seed", range(5))
def test_rounding_shows_without_a_name_where_float64_does_not_run(seed):
    """The fused fake quantizers of torch.ao know float32 only; a step may go over the edge of one of their levels."""
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
    assert rounded_weight(by_torch_ao(), x)


@given(networks())
@settings(max_examples=20)
def test_a_float_network_is_never_taken_for_a_quantized_one(made):
    model, x, _ = made
    assert rounded_weight(model, x[:2]) == ""
    assert rounded_weight(model.float(), x[:2].float()) == ""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-6)
        next(model.parameters()).zero_()
    assert rounded_weight(model, x[:2].float()) == ""


@pytest.mark.parametrize("scheme", ["W4A4", "W2A32", "W8A8"])
def test_own_quantizers_keep_their_three_definitions(scheme):
    model = quantize(tiny(3), QuantSpec.parse(scheme))
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    calibrate(model, x, "mse")
    for definition in ("dequantized", "latent", "float"):
        assert hessian_trace(model, (x, y), definition=definition).method == "exact"


class Noise(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x + self.scale * torch.randn_like(x)


class AlwaysOn(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.1)


@pytest.mark.parametrize("layer", [AlwaysOn(), Noise(1.0), Noise(1e-3), Noise(1e-6)])
def test_random_outputs_are_called_random(layer):
    model = nn.Sequential(nn.Linear(6, 5), layer, nn.Linear(5, 3)).eval()
    for measure in (hessian_trace, hessian_eigs, spectral_density, gradient_norms, sharpness):
        with pytest.raises(UserError, match=r"not deterministic.*'1' \(\w+\) on, as it draws random numbers"):
            measure(model, (X, Y))


def test_random_numbers_without_effect_and_outside_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 5), Noise(0.0), nn.Linear(5, 3)).eval()
    assert hessian_trace(model, (X, Y), method="hutchinson", **FEW).value
    model, state = net(), torch.random.get_rng_state()
    hessian_trace(model, (X, Y), loss=MEANS["focal"], **FEW)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_buffer_that_the_forward_pass_moves_is_named():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(1))
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            self.centre.mul_(0.9).add_(0.1 * x.mean())
            return self.head(x - self.centre)

    with pytest.raises(UserError, match=r"changes the buffer 'centre'.*if self\.training"):
        hessian_trace(Running(), (X, Y))


def test_a_little_mixing_of_samples_is_mixing():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            z = self.head(x)
            return z + 1e-3 * z.mean(0)

    with pytest.raises(UserError, match=r"depends on the others in its batch, from '\(model\)' \(Mixing\)"):
        hessian_trace(Mixing(), (X, Y))


@pytest.mark.parametrize("scale", [1e6, 1e20])
@pytest.mark.parametrize("method", ["auto", "hutchinson", "deflated"])
def test_logits_without_digits_are_refused(scale, method):
    with pytest.raises(UserError, match=r"outputs reach .* the largest input"):
        hessian_trace(net(), (scale * X, Y), method=method)
    assert hessian_trace(net().double(), (1e3 * X.double(), Y)).value > 0


@pytest.mark.parametrize(
    ("x", "said"), [(torch.full_like(X, torch.nan), "NaN or infinity"), (torch.full_like(X, 3e38), r"'0' \(Linear\)")]
)
def test_what_is_not_finite_is_named(x, said):
    model = net()
    model[0].weight.data *= 100
    with pytest.raises(UserError, match=said):
        hessian_trace(model, (x, Y))


def complex_net():
    return nn.Linear(6, 3, dtype=torch.complex64)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), super().forward(-x)


class Flat(nn.Linear):
    def forward(self, x):
        return super().forward(x).reshape(-1, 1)


@pytest.mark.parametrize(
    ("model", "x", "said"),
    [
        (nn.LazyLinear(3), X, "no shape yet"),
        (complex_net(), X, "is complex"),
        (Pair(6, 3), X, "gives a tuple"),
        (Flat(6, 3), X, "a row for each"),
        (net(), X[:, :4], "cannot be run on these inputs"),
        (net(), X.to(torch.uint8), "cannot be run on these inputs"),
        (net().requires_grad_(False), X, "no trainable parameter"),
    ],
)
def test_models_that_cannot_be_measured(model, x, said):
    with pytest.raises(UserError, match=said):
        hessian_trace(model, (x, Y))


def test_types_of_numbers():
    """Weights in half precision are those weights, in the arithmetic of float32; data follow the model."""
    truth = hessian_trace(net().double(), (X.double(), Y)).value
    assert hessian_trace(net().double(), (X, Y)).value == pytest.approx(truth, rel=1e-5)
    assert hessian_trace(net(), (X.double(), Y)).value == pytest.approx(truth, rel=1e-5)
    for kind in (torch.int32, torch.uint8):
        assert hessian_trace(net(), (X, Y.to(kind))).value == pytest.approx(truth, rel=1e-5)
    coarse = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).bfloat16()
    found = hessian_trace(coarse, (X.bfloat16(), Y), n_products=400)
    assert found.method == "deflated"
    assert found.value == pytest.approx(dense(coarse, x=X.bfloat16()), rel=1e-3, abs=5 * found.sem)
    assert coarse[0].weight.dtype == torch.bfloat16


def test_loss_and_accuracy_stand_beside_the_trace():
    model = net()
    found = hessian_trace(model, (X, Y), micro_batch=7)
    z = model(X)
    assert found.loss == pytest.approx(float(F.cross_entropy(z, Y).detach()), rel=1e-5)
    assert found.accuracy == pytest.approx(float((z.argmax(1) == Y).float().mean()))
    assert not found.at_chance  # of 20 images nothing can be said
    squares = hessian_trace(model, (X, torch.randn(20, 3)), loss=F.mse_loss, **FEW)
    assert squares.loss > 0
    assert math.isnan(squares.accuracy)


def on_record(model, data, epochs):
    """The trace's rows, as of a run's checkpoints."""
    rows = []
    for epoch in epochs:
        about = {"run": "a", "epoch": epoch, "key": str(epoch), "seed": 0, "method": "fp", "bits": "FP", "model": "m"}
        about |= {"data": "d", "train_seed": 0, "loss": "cross_entropy"}
        blank = {"status": "ok", "samples": None, "ci95": 0.0, "sem_data": 0.0}
        rows += [{**blank, **row, **about} for row in HessianTrace()(Point(model, data))]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("share", "at_chance"), [(0.5, True), (0.8, False)])
def test_chance_is_the_most_frequent_class(share, at_chance, capsys):
    """Half of the targets are of one class, which a network names always, or for most that are so."""
    x, y = torch.zeros(200, 2), torch.arange(200) % 2
    x[:, 0] = torch.where(torch.arange(200) < 200 * (share - 0.5) * 2, 2.0 * y - 1, 1.0)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0], [1, 0]]))
        model.bias.zero_()
    found = hessian_trace(model, (x, y))
    assert found.accuracy == pytest.approx(share)
    assert found.at_chance is at_chance
    print_traces(on_record(model, (x, y), epochs=[0, 3]))
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert f"{100 * share:.1f}" in text
    assert ("At chance: a (epoch 3)." in text) is at_chance


def test_a_loss_above_guessing_shows(capsys):
    """Of a network that names most classes right, on inputs at a wrong scale."""
    y = torch.arange(200) % 2
    x = torch.stack([torch.where(torch.arange(200) % 5 > 0, 2.0 * y - 1, 1 - 2.0 * y), torch.zeros(200)], 1)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-0.6, 0], [0.6, 0]]))
        model.bias.zero_()
    for scale, above in ((1.0, False), (16.0, True)):
        found = hessian_trace(model, (scale * x, y))
        assert found.above_guessing is above
        assert not found.at_chance
        assert (found.loss > math.log(2)) is above
        fit = diagnose(model, (scale * x, y)).set_index("check").loc["fit"]
        assert fit["status"] == ("note" if above else "ok")
        assert "accuracy 80.0%" in fit["finding"]
        print_traces(on_record(model, (scale * x, y), epochs=[0, 3]))
        text = capsys.readouterr().out
        assert ("Above guessing: a (epoch 3)." in text) is above
        assert all(len(line) <= 80 for line in text.splitlines())


def test_probabilities_as_targets_have_a_loss_of_their_own():
    """That of a network that gives just them was called worse than a guess by their most probable class."""
    targets = torch.tensor([[0.6, 0.4]]).repeat(100, 1)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(targets[0].log())
    found = hessian_trace(model, (torch.randn(100, 2), targets))
    assert found.loss == pytest.approx(-float((targets[0] * targets[0].log()).sum()), rel=1e-5)
    assert not found.above_guessing


@pytest.mark.parametrize("place", [0, 300, 4999, 8999])
def test_a_label_that_is_no_class_is_found_wherever_it_is(place):
    """Of much data only some is run through the model first; the labels are all looked at."""
    x, y = torch.randn(9000, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(9000, dtype=torch.long)
    y[place] = 3
    with pytest.raises(UserError, match="0 to C - 1"):
        hessian_trace(net(), (x, y), method="hutchinson", n_products=2)


def test_what_was_made_in_inference_mode_is_measured_and_in_it_nothing_is():
    with torch.inference_mode():
        model, data = net(), (X.clone(), Y.clone())
        with pytest.raises(UserError, match="torch.inference_mode"):
            hessian_trace(model, data)
    found = hessian_trace(model, data)
    assert found.method == "exact"
    assert found.value == hessian_trace(net(), (X, Y)).value


class Taken(nn.Module):
    """Its outputs are taken out of autograd."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return self.body(x).detach()


class Bags(nn.Module):
    """An operation without a second derivative."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.bag(x.long().abs() % 7))


def _with_graph():
    model = weight_norm(nn.Linear(6, 3))
    model(X)  # and holds its weight's graph now
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("build", "says"),
    [
        (Taken, "no gradient in any parameter"),
        (Bags, "no second derivative .*embedding_bag.*doctor"),
        (_with_graph, "'weight' is a result of a forward pass.*no_grad"),
    ],
)
def test_what_cannot_be_differentiated_or_copied_is_said_in_words(build, says):
    with pytest.raises(UserError, match=says):
        hessian_trace(build(), (X, Y), **FEW)
    with pytest.raises(UserError, match=says):
        hessian_eigs(build(), (X, Y), k=1)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_with_its_graph_is_measured_after_a_pass_without_gradients():
    model = _with_graph()
    with torch.no_grad():
        model(X)
    plain = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    found, truth = (hessian_trace(m, (X, Y), method="deflated", n_products=200) for m in (model, plain))
    assert found.value == pytest.approx(truth.value, rel=1e-3)


FUNCTIONS = [hessian_trace, gradient_norms, sharpness, spectral_density, output_variance, feature_statistics]


def quantized(dtype=torch.float32):
    torch.manual_seed(0)
    model = quantize(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)), W4A4
    )
    images = torch.randn(12, 1, 8, 8)
    calibrate(model, images, "minmax")
    return model.to(dtype), (images, torch.arange(12) % 3)


W4A4 = QuantSpec(weight_bits=4, act_bits=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_quantized_network_in_half_precision_is_that_of_the_same_weights_in_float32(dtype):
    model, data = quantized(dtype)
    wide = copy.deepcopy(model).float()
    for measure in FUNCTIONS:
        found, truth = (measure(m, data).frame()["value"] for m in (model, wide))
        pd.testing.assert_series_equal(found, truth)
    moved = [copy.deepcopy(m) for m in (model, wide)]
    for m in moved:
        with torch.no_grad():
            m[0].parametrizations.weight.original.mul_(0.75)
    found, truth = (oscillation(*pair).frame()["value"] for pair in zip((model, wide), moved, strict=True))
    pd.testing.assert_series_equal(found, truth)
    assert clipped_fraction(model) == clipped_fraction(wide)


@pytest.mark.parametrize("measure", [*FUNCTIONS, noise_response, landscape])
def test_numbers_do_not_depend_on_the_default_type(measure):
    model, data = quantized()
    settings = {"points": 3} if measure is landscape else {}
    truth = measure(model, data, **settings).frame()["value"]
    torch.set_default_dtype(torch.float64)
    try:
        found = measure(model, data, **settings).frame()["value"]
    finally:
        torch.set_default_dtype(torch.float32)
    pd.testing.assert_series_equal(found, truth)


@pytest.mark.parametrize(
    "measure", [feature_statistics, output_variance, functools.partial(feature_drift, quantized()[0])]
)
def test_inputs_that_the_network_does_not_take_are_said_in_words(measure):
    model, (images, labels) = quantized()
    with pytest.raises(UserError, match=r"cannot be run on these inputs, of shape .*, 2, 8, 8\)"):
        measure(model, (torch.cat([images, images], 1), labels))


def test_a_teacher_in_another_precision_is_measured_in_the_finer_one():
    model, data = quantized()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher[2].bias.add_(1)
    finer = feature_drift(copy.deepcopy(model).double(), teacher, data).frame()["value"]
    assert finer.tolist() == pytest.approx(
        feature_drift(model, teacher, data).frame()["value"].tolist(), rel=1e-3, abs=1e-5
    )


class OfFixedSize(nn.Module):
    """As a program that was exported for batches of one size."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        assert len(x) == 20, "Guard failed"
        return self.body(x)


def test_a_network_for_batches_of_one_size_is_refused_in_words():
    with pytest.raises(UserError, match=r"cannot be run on these inputs, of .*AssertionError: Guard failed"):
        hessian_trace(OfFixedSize(), (X, Y))
