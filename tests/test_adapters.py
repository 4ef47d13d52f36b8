"""Other programs' quantized networks, against the same networks written by hand, in float64."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.ao.quantization as ao
from torch import nn
from torch.nn import functional as F

from fpq_analysis import (
    ForeignRuns,
    HessianTrace,
    UserError,
    diagnose,
    draw_figures,
    feature_statistics,
    hessian_eigs,
    hessian_trace,
    landscape,
    measure,
    noise_response,
    oscillation,
    output_variance,
    sharpness,
)
from fpq_analysis.choices import DEFINITIONS
from fpq_analysis.probes.subject import prepare
from fpq_analysis.quantizers import (
    Affine,
    adopt,
    clipped_fraction,
    plain_layer,
    quantizers,
    register_adapter,
)
from fpq_analysis.quantizers.adapters import adapter
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
    "ModelOpt": foreign_nets.modelopt,
    "pt2e": foreign_nets.pt2e,
    "pt2e, BatchNorm": lambda: foreign_nets.pt2e(batch_norm=True),
}
PACKAGES = {"torchao": "torchao", "torchao, learned": "torchao", "Brevitas": "brevitas", "pt2e": "torchao"}
PACKAGES |= {"ModelOpt": "modelopt", "pt2e, BatchNorm": "torchao"}
every_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


def build(front_end):
    if front_end in PACKAGES:
        pytest.importorskip(PACKAGES[front_end])
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
    own_trace = dense.diagonal().split([p.numel() for p in own])
    assert all(float(part.sum()) > 1e-4 * float(size) for part in own_trace)  # no layer is left out
    found = subject.operator().dense()
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-8 * size)
    trace = hessian_trace(model, (X, Y), definition=definition, n_products=60)
    if "pt2e" in front_end or (front_end == "Brevitas" and definition == "latent"):  # no layers; dQ/dw is no mask
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
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(adopted(X.float()), model(X.float()), rtol=0, atol=1e-5)
    assert adopt(adopted) is adopted
    assert [name for name, q, is_weight in quantizers(adopted) if q.step_size.isnan().any()] == []
    assert 0.4 < clipped_fraction(adopted) < 0.75


def test_the_known_case_is_three_numbers():
    """A network with 45 to 75 % of its weights clipped: printing one number for all three is wrong twice."""
    pair = foreign_nets.torch_ao(share=0.6, wide=3.0)
    assert 0.45 < pair.by_hand("float").clipped_fraction() < 0.75
    model = copy.deepcopy(pair.model).double()
    found = {d: hessian_trace(model, (X, Y), definition=d) for d in DEFINITIONS}
    for definition, trace in found.items():
        hand = pair.by_hand(definition)
        dense = dense_hessian(hand, list(hand.parameters()), X, Y)
        assert trace.value == pytest.approx(float(dense.trace()), rel=1e-8)
    numbers = sorted(trace.value for trace in found.values())
    assert numbers[0] < 0.7 * numbers[1] < 0.5 * numbers[2]


# --- measurements that ask for quantizers ---


@pytest.mark.parametrize("front_end", ["torch.ao", "FX", "learnable", "torchao", "Brevitas"])
def test_measurements_of_quantizers_work(front_end):
    model = build(front_end).model
    later = copy.deepcopy(model)
    with torch.no_grad():
        for p in later.parameters():
            p.add_(0.05 * torch.randn_like(p))
    shares = oscillation(later, model)
    assert 0 < shares["flipped"]["value"] < 1
    flat = sharpness(model, (X.float(), Y), n_draws=2, n_flips=4)
    assert abs(flat["half_step_worst"]["value"]) > 1e-6
    checks = diagnose(model, (X.float(), Y)).set_index("check")
    assert "fault" not in set(checks["status"])
    assert "quantizers are calibrated" in checks.loc["quantizers", "finding"]
    for weights in ("requantized", "dequantized"):
        line = landscape(model, (X.float(), Y), weights=weights, dim=1, points=3)
        assert np.isfinite(line.loss).all()


@pytest.mark.parametrize("front_end", ["torch.ao", "FX"])
def test_noise_is_in_the_steps_of_the_quantizer_that_a_convolution_takes_from(front_end):
    pair = build(front_end)
    adopted = adopt(pair.model, X.float())
    inputs = {name: adopted.get_submodule(name).input_quantizer for name in ("conv1", "conv2", "conv3")}
    for name, source in (("conv1", "quant"), ("conv2", "conv1"), ("conv3", "conv2")):
        assert float(inputs[name].step_size) == pytest.approx(float(pair.activations[source].scale))
    assert {row["layer"] for row in noise_response(pair.model, (X.float(), Y), n_draws=2).rows()} >= {"conv1", "conv2"}


@pytest.mark.parametrize("torch_clamp", [True, False])
def test_the_gradient_at_the_bounds_of_an_affine_grid(torch_clamp):
    x = torch.tensor([-9.0, -8.2, -7.0, 0.3, 7.1, 9.0], dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    (found,) = torch.autograd.grad(Affine(one, zero, -8, 7, torch_clamp=torch_clamp)(x).sum(), x)
    k = x.detach().round().requires_grad_()
    (clamped,) = torch.autograd.grad(k.clamp(-8, 7).sum(), k)
    assert torch.equal(found, clamped if torch_clamp else (k.detach() == k.detach().clamp(-8, 7)).double())


def test_the_doctor_says_in_what_another_programs_network_in_half_precision_is_measured():
    model = foreign_nets.torch_ao().model.bfloat16()
    row = diagnose(model, (X.float(), Y)).set_index("check").loc["dtype"]
    assert row["status"] == "note"
    assert "bfloat16, and are measured in float32" in row["finding"]


# --- adapters of one's own ---


def rounded(x, step, low, high):
    """Straight-through where it is not clipped."""
    q = (x / step).round()
    x = torch.where((q >= low) & (q <= high), x, x.detach())
    return x + (q.clamp(low, high) * step - x).detach()


class Ternary(nn.Linear):
    """Somebody's layer: weights of -s, 0 and s."""

    s = 0.05

    def forward(self, x):
        return F.linear(x, rounded(self.weight, self.s, -1, 1), self.bias)


@pytest.fixture
def registry(monkeypatch):
    for front_end in set(adapter.FRONT_ENDS.values()):  # once only: else they would be gone with this test's own
        adapter._load(front_end)
    monkeypatch.setattr(adapter, "_adapters", dict(adapter._adapters))


def ternary_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), Ternary(36, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


def ternary(layer, s=0.05, low=-1):
    return plain_layer(layer, nn.Linear, Affine(torch.tensor(s), torch.tensor(0), low, 1))


def test_an_unknown_quantizer_is_refused_with_the_way_to_make_it_known(registry):
    model = ternary_net()
    with pytest.raises(UserError, match="register_adapter"):
        hessian_trace(model, (X.float(), Y))
    register_adapter(Ternary)(ternary)
    found = {d: hessian_trace(model, (X.float(), Y), definition=d) for d in DEFINITIONS}
    assert all(trace.method == "exact" for trace in found.values())
    assert len({trace.value for trace in found.values()}) == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"s": 0.25}, "the weight that '1' uses"),
        ({"low": 0}, "the weight that '1' uses"),
    ],
)
def test_an_adapter_that_disagrees_with_the_forward_pass_is_found_out(registry, wrong, said):
    register_adapter(Ternary)(lambda layer: ternary(layer, **wrong))
    for function in (hessian_trace, sharpness, output_variance, feature_statistics):
        with pytest.raises(UserError, match=rf"disagrees with the forward pass: {said}"):
            function(ternary_net(), (X.float(), Y))


class PassesAll(Ternary):
    """Gradients pass where weights are clipped, too."""

    def forward(self, x):
        q = self.s * (self.weight / self.s).round().clamp(-1, 1)
        return F.linear(x, self.weight + (q - self.weight).detach(), self.bias)


class PassesBeforeRounding(Ternary):
    def forward(self, x):
        q = (self.weight / self.s).clamp(-1, 1)
        return F.linear(x, self.s * (q + (q.round() - q).detach()), self.bias)


class EveryGradient(Affine):
    def quantize(self, x):
        return x + (super().quantize(x) - x).detach()


@pytest.mark.parametrize("kind", [PassesAll, PassesBeforeRounding])
def test_an_adapter_that_stops_other_gradients_than_the_layer_is_found_out(registry, kind):
    """Its latent Hessian was that of another network, which gives the same outputs."""
    model = nn.Sequential(nn.Flatten(), kind(36, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    register_adapter(kind)(ternary)
    with pytest.raises(UserError, match=r"disagrees with the backward pass: '1' passes a gradient to its weight"):
        hessian_trace(model, (X, Y), definition="latent")
    if kind is PassesAll:
        every = lambda layer: plain_layer(layer, nn.Linear, EveryGradient(torch.tensor(0.05), torch.tensor(0), -1, 1))  # noqa: E731
        register_adapter(kind)(every)
        dense = dense_hessian(model, list(model.parameters()), X, Y)
        trace = hessian_trace(model, (X, Y), definition="latent").value
        assert trace == pytest.approx(float(dense.diagonal().sum()), rel=1e-9)


class Steps(nn.Module):
    """Activations on `levels` steps of 0.1."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def forward(self, x):
        return rounded(x, 0.1, 0, self.levels)


def test_an_adapter_that_is_wrong_for_a_sample_among_many_is_found_out(registry):
    x = 5 * torch.cat([X.float()] * 3)[:64]
    x[:4] /= 100
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), Steps(15), nn.Linear(4, 3)).eval()
    register_adapter(Steps)(lambda module: Affine(torch.tensor(0.1), torch.tensor(0), 0, 255))
    with pytest.raises(UserError, match="disagrees with the forward pass: what '2' puts out"):
        hessian_trace(model, (x, torch.arange(len(x)) % 3))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda layer: None, "gives a NoneType"),
        (lambda layer: nn.Linear(2, 2), "makes of '1' fails"),
        (lambda layer: 1 / 0, "fails: Ze"),
    ],
)
def test_an_adapter_that_fails_is_said_in_words(registry, wrong, said):
    register_adapter(Ternary)(wrong)
    with pytest.raises(UserError, match=said):
        hessian_trace(ternary_net(), (X.float(), Y))


def test_an_adapter_that_forgets_a_quantizer_of_activations_is_found_out(registry):
    model = build("torch.ao").model
    register_adapter(torch.ao.quantization.FakeQuantizeBase)(lambda module: nn.Identity())
    with pytest.raises(UserError, match=r"disagrees with the forward pass: what 'quant\.activation_post_process'"):
        hessian_trace(model, (X.float(), Y))


def test_a_layer_folded_with_its_batch_norm_whose_quantizers_are_off_is_a_float_one():
    model = build("torch.ao").model.apply(ao.disable_fake_quant)
    found = [hessian_trace(model, (X.float(), Y), definition=d).value for d in DEFINITIONS]
    plain = copy.deepcopy(foreign_nets.torch_ao().by_hand("float"))
    dense = dense_hessian(plain, list(plain.parameters()), X, Y)
    assert found == pytest.approx([float(dense.trace())] * 3, rel=1e-4)


def test_layers_that_modelopt_leaves_in_floating_point_are_plain_ones():
    mtq = pytest.importorskip("modelopt.torch.quantization")
    torch.manual_seed(0)
    parts = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    model = mtq.quantize(nn.Sequential(*parts), copy.deepcopy(mtq.INT8_DEFAULT_CFG), lambda net: net(X.float())).eval()
    assert type(model[1]) is not nn.BatchNorm2d
    adopted = adopt(model, X.float())
    assert [type(adopted[i]) for i in (1, 3)] == [nn.BatchNorm2d, nn.MaxPool2d]
    assert hessian_trace(model, (X.float(), Y)).method == "exact"


def test_quantizers_in_a_row_of_modelopt_are_refused_in_words():
    mtq = pytest.importorskip("modelopt.torch.quantization")
    row = [{"num_bits": 4, "axis": 0}, {"num_bits": 8, "axis": None}]
    config = {"quant_cfg": {"*weight_quantizer": row, "*input_quantizer": {"enable": False}}, "algorithm": "max"}
    model = mtq.quantize(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), config, lambda net: net(X.float())).eval()
    with pytest.raises(UserError, match="register_adapter"):
        hessian_trace(model, (X.float(), Y))


@pytest.mark.parametrize(
    ("config", "pattern", "said"),
    [
        ("INT8_SMOOTHQUANT_CFG", "*input_quantizer", "is a quantizer of ModelOpt"),  # whose inputs it still scales
        ("NVFP4_DEFAULT_CFG", "*weight_quantizer", "on cpu .*CUDA"),
    ],
)
def test_what_modelopt_does_beside_rounding_to_integers_is_refused_in_words(config, pattern, said):
    mtq = pytest.importorskip("modelopt.torch.quantization")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))
    forward = (lambda model: model(X.float())) if "INT8" in config else None
    model = mtq.quantize(net, copy.deepcopy(getattr(mtq, config)), forward).eval()
    mtq.disable_quantizer(model, pattern)
    with pytest.raises(UserError, match=said):
        hessian_trace(model, (X.float(), Y))


def test_a_network_that_modelopt_calibrates_is_said_to_be_calibrated():
    model = build("ModelOpt").model
    quantizer = model.get_submodule("1.input_quantizer")
    quantizer.disable_quant(), quantizer.enable_calib()
    with pytest.raises(UserError, match="'1' .* is being calibrated"):
        hessian_trace(model, (X.float(), Y))


@pytest.mark.parametrize("name", ["1", "2"])
def test_a_layer_of_brevitas_in_export_mode_is_named(name):
    model = build("Brevitas").model
    model.get_submodule(name).export_mode = True
    with pytest.raises(UserError, match=f"'{name}' .* is in export mode"):
        hessian_trace(model, (X.float(), Y))


def test_torchao_layers_of_block_formats_are_refused():
    """Differentiated twice they lack the terms between layers, without a word."""
    qat = pytest.importorskip("torchao.quantization.qat")
    blocks = pytest.importorskip("torchao.prototype.qat")
    from torchao.quantization import quantize_

    config = blocks.MXFakeQuantizeConfig(dtype=torch.float8_e4m3fn)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    quantize_(model, qat.QATConfig(weight_config=config, activation_config=config, step="prepare"))
    for definition in DEFINITIONS:
        with pytest.raises(UserError, match="'0' .*lack the terms between layers"):
            hessian_trace(model, (torch.randn(12, 64), Y), definition=definition)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_torchao_latent_hessian_is_that_of_its_own_gradient(bits, symmetric):
    """Where most weights are rounded to the bounds, at which `torch.clamp` may pass no gradient."""
    qat = pytest.importorskip("torchao.quantization.qat")
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
    weights = qat.IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), group_size=32, is_symmetric=symmetric)
    inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    prepare_all = qat.QATConfig(weight_config=weights, step="prepare")
    quantize_(model, prepare_all, filter_fn=lambda layer, name: name == "0")
    quantize_(model, qat.QATConfig(activation_config=inputs, step="prepare"), filter_fn=lambda layer, name: name == "2")
    data = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), Y
    subject = prepare(model, data, definition="latent")
    assert subject.model is not model  # it is known
    dense = dense_hessian(model, [model.get_parameter(name) for name in subject.parameters], *data)
    size = float(dense.abs().max())
    torch.testing.assert_close(subject.operator().dense().to(dense), dense, rtol=0, atol=1e-5 * size)


def test_torchao_scales_of_half_precision_have_a_latent_hessian_only():
    qat = pytest.importorskip("torchao.quantization.qat")
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
    config = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32, scale_precision=torch.bfloat16)
    prepare = qat.QATConfig(weight_config=config, step="prepare")
    quantize_(model, prepare, filter_fn=lambda layer, name: name == "0")
    data = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), Y
    with pytest.raises(UserError, match="definition='latent'"):
        hessian_trace(model, data)
    assert hessian_trace(model, data, definition="latent").value > 0


@pytest.mark.parametrize("package", ["Brevitas", "torchao"])
def test_steps_that_an_unknown_quantizer_learns_are_no_variables(package):
    torch.manual_seed(0)
    if package == "Brevitas":
        qnn = pytest.importorskip("brevitas.nn")
        from brevitas.quant import Int4WeightPerTensorFloatDecoupled

        options = {"weight_quant": Int4WeightPerTensorFloatDecoupled}
        model = nn.Sequential(nn.Flatten(), qnn.QuantLinear(36, 4, True, **options), nn.ReLU(), nn.Linear(4, 3))
    else:
        qat = pytest.importorskip("torchao.quantization.qat")
        from torchao.quantization import quantize_

        more = {"scale_precision": torch.float32, "zero_point_precision": torch.float32}
        config = qat.IntxFakeQuantizeConfig(
            torch.int4, "per_channel", is_symmetric=False, is_dynamic=False, range_learning=True, **more
        )
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3))
        quantize_(model, qat.QATConfig(weight_config=config, step="prepare"))
        qat.initialize_fake_quantizers(model, (X.float(),))
        for name in ("1", "3"):
            model.get_submodule(name).weight_fake_quantizer.zero_point.data.add_(0.3)
    model.eval()(X.float())
    names = "1.weight", "1.bias", "3.weight", "3.bias"
    assert set(dict(model.named_parameters())) > set(names)
    subject = prepare(model, (X.float(), Y), definition="latent")
    assert set(subject.parameters) == set(names)
    dense = dense_hessian(model, [model.get_parameter(name) for name in subject.parameters], X.float(), Y)
    torch.testing.assert_close(
        subject.operator().dense().to(dense), dense, rtol=0, atol=1e-5 * float(dense.abs().max())
    )


class EightBits(torch.autograd.Function):
    """Rounding to float8, forward and backward."""

    @staticmethod
    def forward(ctx, w):
        return w.to(torch.float8_e4m3fn).to(w.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(torch.float8_e4m3fn).to(grad.dtype)


class InFloat8(nn.Linear):
    def forward(self, x):
        return F.linear(x, EightBits.apply(self.weight), self.bias)


def test_a_backward_pass_in_eight_bits_has_no_second_derivative():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), InFloat8(36, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    for measure_it in (hessian_trace, hessian_eigs):
        with pytest.raises(UserError, match=r"'1\.weight' is rounded in the backward pass"):
            measure_it(model, (X.float(), Y), definition="latent")


def test_a_quantizer_that_does_not_run_is_named(registry):
    class Broken(Ternary):
        def forward(self, x):
            raise RuntimeError("no kernel for this device")

    register_adapter(Broken)(ternary)
    with pytest.raises(UserError, match="cannot be run on these inputs.*no kernel for this device"):
        hessian_trace(nn.Sequential(nn.Flatten(), Broken(36, 3)), (X.float(), Y))


def test_an_exported_program_is_no_module():
    program = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), (X.float(),))
    with pytest.raises(UserError, match=r"ExportedProgram.*program\.module\(\)"):
        hessian_trace(program, (X.float(), Y))
    assert "ExportedProgram" in diagnose(program, (X.float(), Y))["finding"][0]


def test_a_batch_norms_slope_within_a_rounded_weight_is_a_constant():
    """Double backward through torch.ao's layer differentiates it there, too: that is all they differ in."""
    pair = foreign_nets.torch_ao()
    model = copy.deepcopy(pair.model)
    names = list(prepare(model, (X.float(), Y), definition="latent").parameters)
    found = prepare(copy.deepcopy(model).double(), (X, Y), definition="latent").operator().dense()
    size = float(found.abs().max())
    by_hand = {kind: foreign_nets.Folded(pair, moving=kind == "moving") for kind in ("constant", "moving")}
    dense = {kind: dense_hessian(hand, [hand.named[n] for n in names], X, Y) for kind, hand in by_hand.items()}
    torch.testing.assert_close(found, dense["constant"], rtol=0, atol=1e-8 * size)
    named = dict(model.named_parameters())
    raw = dense_hessian(model, [named[n] for n in names], X.float(), Y).double()
    torch.testing.assert_close(raw, dense["moving"], rtol=0, atol=1e-5 * size)
    assert float((dense["moving"] - dense["constant"]).abs().max()) > 0.05 * size


def test_a_graph_in_training_mode_is_measured_as_in_eval_mode():
    model = build("pt2e, BatchNorm").model
    before = hessian_trace(model, (X.float(), Y)).value
    for node in model.graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default:
            node.update_arg(5, True)
    model.recompile()
    assert hessian_trace(model, (X.float(), Y)).value == before


def converted(front_end):
    """A network after its conversion for inference: integers, biases, maybe layers as they were."""
    if front_end == "reference, one layer":  # weights are stored as they were, and the layers ahead have no gradient
        from torch.ao.quantization import quantize_fx

        mapping = ao.QConfigMapping().set_module_name("2", ao.get_default_qat_qconfig("fbgemm"))
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3))
        prepared = quantize_fx.prepare_qat_fx(net.train(), mapping, (X.float(),))
        prepared(X.float())
        return quantize_fx.convert_to_reference_fx(prepared.eval())
    if front_end == "torch.ao, one layer":
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
        return ao.quantize_dynamic(net, {"3": ao.default_dynamic_qconfig})
    if front_end == "torch.ao":
        return ao.convert(build("torch.ao").model)
    pytest.importorskip("torchao")
    if "pt2e" in front_end:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        return convert_pt2e(build("pt2e").model, fold_quantize=front_end == "pt2e")
    if front_end == "ModelOpt":
        mtq = pytest.importorskip("modelopt.torch.quantization")
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3))
        net = mtq.quantize(net, copy.deepcopy(mtq.INT8_DEFAULT_CFG), lambda model: model(X.float()))
        mtq.compress(net)
        return net
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3))
    quantize_(net, Int8WeightOnlyConfig())
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "front_end",
    ["torch.ao", "torch.ao, one layer", "reference, one layer", "torchao", "pt2e", "pt2e, not folded", "ModelOpt"],
)
def test_a_network_that_was_converted_for_inference_is_refused(front_end):
    model = converted(front_end)
    for definition in DEFINITIONS:
        with pytest.raises(UserError, match="integers.*: the network was converted for inference"):
            hessian_trace(model, (X.float(), Y), definition=definition)


def test_records_of_another_programs_network_say_that_it_is_quantized(tmp_path):
    def factory():
        return foreign_nets.torch_ao().model

    model = factory()
    (tmp_path / "net").mkdir()
    torch.save(model.state_dict(), tmp_path / "net" / "epoch_0.pt")
    np.savez(tmp_path / "data.npz", x=X.float().numpy(), y=Y.numpy())
    rows = measure(ForeignRuns(tmp_path / "net", factory, tmp_path / "data.npz"), HessianTrace(), device="cpu")
    assert set(zip(rows["method"], rows["bits"], strict=True)) == {("quantized", "W8A7")}


def test_so_do_those_of_a_network_that_rounds_in_its_own_forward(tmp_path):
    class Rounded(nn.Linear):
        def forward(self, x):
            rounded = (10 * self.weight).round() / 10
            return nn.functional.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)

    for name, layer in (("rounded", Rounded), ("plain", nn.Linear)):
        (tmp_path / name).mkdir()
        factory = partial(layer, 4, 3)
        torch.save(factory().state_dict(), tmp_path / name / "epoch_0.pt")
        data = torch.randn(20, 4), torch.randint(3, (20,))
        runs = ForeignRuns(tmp_path / name, factory, data)
        rows = measure(runs, HessianTrace("latent", n_products=4), device="cpu")
        assert set(rows["method"]) == {"quantized" if name == "rounded" else "fp"}
        if name == "rounded":
            drawn = draw_figures(runs, "5", tmp_path / "figures", device="cpu", on_fault=lambda path, fault: None)
            assert drawn["path"].notna().all()
            assert "latent" in drawn["note"].item()


def test_a_quantizer_that_has_seen_no_data_is_said_to_have_no_scale():
    model = ao.prepare_qat(nn.Sequential(nn.Linear(6, 3)).train().apply(with_qconfig)).eval()
    with pytest.raises(UserError, match="has seen no data yet"):
        hessian_trace(model, (torch.randn(4, 6), torch.arange(4) % 3))


def with_qconfig(module):
    module.qconfig = ao.get_default_qat_qconfig("fbgemm")
