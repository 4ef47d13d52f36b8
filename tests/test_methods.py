"""The methods of the paper's tables against their published definitions, and through the trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fpq_analysis import QuantSpec, TrainConfig, UserError, calibrate, load, quantize, train
from fpq_analysis.files import read_jsonl
from fpq_analysis.methods import METHODS, SCHEMES
from fpq_analysis.quantizers import (
    LSQ,
    PACT,
    DoReFa,
    LSQPlus,
    SymmetricLSQ,
    changed_fraction,
    fused_quantizers,
    quantizer_parameters,
    quantizers,
    step_sizes,
    view,
    weight_codes,
)
from fpq_analysis.quantizers.calibration import least_squares, minmax, mse
from fpq_analysis.runs import Run
from fpq_analysis.runs.checkpoint import read_checkpoint
from fpq_analysis.runs.inspection import inspect_quantizers
from fpq_analysis.training import loop
from fpq_analysis.training.csd import EPS, csd_loss
from fpq_analysis.training.kd import kd_loss
from fpq_analysis.training.projection import MAX_CHANGE, ScaleProjection
from fpq_analysis.training.sam import ascended
from fpq_analysis.training.sfp import StochasticFeaturePerturbation
from fpq_analysis.training.weight_noise import WeightPerturbation
from tests.nets import tiny

COMMON = {"model": "tests.nets:tiny", "bits": "W4A4", "batch_size": 64, "lr": 0.02, "epochs": 2}
QUANTIZED = [name for name, method in METHODS.items() if method.quantized]
PLAIN = ("lsq", "lsq+", "sam", "noise-features", "noise-weights")
TERMS = {name: {"ce"} for name in PLAIN} | {
    "kd": {"ce", "kd"},
    "fpq": {"ce", "csd"},
    "fpq-pact": {"ce", "csd", "alpha"},
    "pact": {"ce", "alpha"},
}


def quiet(line: str) -> None:
    pass


def calibrated(scheme: str, bits: str = "W4A4") -> tuple[nn.Module, torch.Tensor]:
    """A small quantized network and the images it was calibrated on."""
    model = quantize(tiny(), QuantSpec.parse(bits, scheme=scheme))
    x = torch.randn(16, 1, 8, 8)
    calibrate(model, x, "mse")
    return model, x


def derivatives(quantizer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Output; derivatives of sum(g output) in x and in each parameter."""
    x = x.clone().requires_grad_()
    out = quantizer(x)
    found = torch.autograd.grad(out, [x, *quantizer.parameters()], g)
    return tuple(t.detach().numpy() for t in (out, *found))


# Quantizers -----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.integers(0, 1000), st.sampled_from([-0.37, 0.0, 1.1]), st.booleans(), st.booleans())
def test_lsq_plus_is_the_published_one(bits, seed, offset, fused, training):
    """Values inside, below and above the range; the factor on the gradients of s and b while training only."""
    levels, step = 2**bits - 1, 0.13
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) * step * levels + offset
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    quantizer = LSQPlus(bits).double().train(training)
    quantizer.fused = fused
    with torch.no_grad():
        quantizer.step_size.fill_(step)
        quantizer.offset.fill_(offset)
    out, dx, ds, db = derivatives(quantizer, x, g)

    u, g = (x.numpy() - offset) / step, g.numpy()
    k = np.round(u)
    inside = (k >= 0) & (k <= levels)
    factor = 1 / math.sqrt(75 * levels) if training else 1
    np.testing.assert_allclose(out, np.clip(k, 0, levels) * step + offset, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dx, g * inside, rtol=1e-12)
    np.testing.assert_allclose(ds, factor * (g * np.where(inside, k - u, np.clip(k, 0, levels))).sum(), rtol=1e-9)
    np.testing.assert_allclose(db, factor * (g * ~inside).sum(), rtol=1e-9, atol=1e-12)


@given(st.integers(2, 8), st.integers(0, 1000), st.booleans(), st.booleans())
def test_pact_is_the_published_one(bits, seed, signed, training):
    alpha = 1.7
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, alpha
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    quantizer = PACT(bits).double().train(training)
    with torch.no_grad():
        quantizer.alpha.fill_(alpha)
        quantizer.signed.fill_(signed)
    out, dx, da = derivatives(quantizer, x, g)

    x, g = x.numpy(), g.numpy()
    low = -alpha if signed else 0
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1  # above zero
    y = np.clip(x, low, alpha)
    np.testing.assert_allclose(out, np.round(y * levels / alpha) * alpha / levels, rtol=1e-12)
    np.testing.assert_allclose(dx, g * ((x >= low) & (x < alpha)), rtol=1e-12)
    np.testing.assert_allclose(da, (g * (x >= alpha)).sum() - signed * (g * (x < low)).sum(), rtol=1e-9, atol=1e-12)


@given(st.integers(2, 8), st.integers(0, 1000))
def test_dorefa_is_the_published_one(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(w.shape, generator=generator, dtype=torch.float64)
    quantizer = DoReFa(bits, 6, 4).double()
    quantizer.calibrate(w, "mse")
    levels, c = quantizer.levels, float(quantizer.step_size) * quantizer.levels / 2
    out, dw = derivatives(quantizer, w, g)

    t = np.tanh(w.numpy())
    top = np.abs(t).max()
    np.testing.assert_allclose(out, c * (2 * np.round(levels * (t / (2 * top) + 0.5)) / levels - 1), rtol=1e-9)
    # Through the rounding straight, through tanh(w) / max|tanh(w)| by the quotient rule.
    v = c * g.numpy() / top
    place = np.unravel_index(np.abs(t).argmax(), t.shape)
    v[place] -= (c * g.numpy() * t).sum() / top**2 * np.sign(t[place])
    np.testing.assert_allclose(dw, v * (1 - t**2), rtol=1e-9, atol=1e-12)


def test_pact_and_lsq_plus_can_be_differentiated_twice():
    """As analysis needs: the derivative in x does not depend on the scale, so the mixed one is zero, not missing."""
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    for quantizer in (PACT(4), LSQPlus(4)):
        quantizer.double().calibrate(x, "mse")
        first = torch.autograd.grad(quantizer(x * x).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x)[0]
        inside = ~quantizer.clipped((x * x).detach())
        torch.testing.assert_close(second, 2 * inside.double())


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 1000), st.booleans(), st.sampled_from(["mse", "minmax"]))
def test_outputs_lie_on_the_grid(bits, seed, relu, how):
    torch.manual_seed(seed)
    x = torch.randn(6, 4, 3, 3) + 0.3
    x = x.relu() if relu else x
    for quantizer in (LSQ(bits), LSQPlus(bits), PACT(bits), SymmetricLSQ(bits, 6, 4), DoReFa(bits, 6, 4)):
        quantizer.calibrate(x, how)
        out = quantizer(x).detach()
        codes = quantizer.codes(x)
        assert codes.min() >= 0
        assert codes.max() <= quantizer.levels
        offset = quantizer.offset if isinstance(quantizer, LSQPlus) else -quantizer.zero_point * quantizer.step_size
        torch.testing.assert_close(out, (codes * quantizer.step_size + offset).detach(), rtol=1e-4, atol=1e-5)
        if not isinstance(quantizer, (LSQPlus, DoReFa)):
            assert (quantizer(torch.zeros_like(x)) == 0).all()  # zero is exact


@given(st.sampled_from([2, 4]), st.integers(0, 1000))
def test_a_free_offset_never_fits_worse(bits, seed):
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(seed)).relu() + 0.1
    step, zero = mse(x, bits)
    free, offset = least_squares(x, step, -zero * step, 2**bits - 1)

    def error(s, b):
        k = ((x - b[:, None]) / s[:, None]).round().clamp(0, 2**bits - 1)
        return (k * s[:, None] + b[:, None] - x).square().mean(1)

    assert (error(free, offset) <= error(step, -zero * step) * (1 + 1e-5)).all()


def test_first_values():
    w = torch.randn(5, 200) * torch.tensor([1.0, 2, 3, 4, 0])[:, None] + 0.1
    w[4] = 0
    weight = SymmetricLSQ(3, 5, 2)
    weight.calibrate(w, "mse")
    mean, sd = w[:4].mean(1), w[:4].std(1, correction=0)
    torch.testing.assert_close(
        weight.step_size.detach()[:4, 0], torch.maximum((mean - 3 * sd).abs(), (mean + 3 * sd).abs()) / 4
    )
    assert (weight.zero_point == 4).all()
    assert (weight(w)[4] == 0).all()
    images, features = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.0, 0.5, 2.0])
    for x, signed in ((images, 1), (features, 0)):
        activation = PACT(4)
        activation.calibrate(x, "minmax")
        assert (float(activation.signed), activation.alpha.item()) == (signed, pytest.approx(2))
    assert minmax(features[None], 4)[0] == pytest.approx(2 / 15)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_as_a_model(scheme, tmp_path):
    model, x = calibrated(scheme)
    model.eval()
    other = quantize(tiny(), QuantSpec.parse("W4A4", scheme=scheme))
    assert any(q.step_size.isnan().all() for _, q, _ in quantizers(other))  # an unset scale is loud
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other.eval()(x))
    assert torch.equal(view(model, "dequantized")(x), model(x))
    with fused_quantizers(model):
        assert torch.equal(other(x), model(x))
    plain = tiny().eval()
    assert torch.equal(quantize(plain, QuantSpec.parse("W32A32", scheme=scheme))(x), plain(x))
    sizes = step_sizes(model)
    assert [len(sizes[name]) for name in ("0.weight", "0.input")] == [1 if scheme == "pact" else 3, 1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QuantSpec.parse("W4A4", scheme="lsq++"), "did you mean 'lsq"),
        (lambda: QuantSpec.parse("W4A32", scheme="pact"), "a clipping level"),
        (lambda: QuantSpec.parse("W2A32", scheme="lsq+"), "an offset.*W2A4"),
        (lambda: QuantSpec.parse("W1A4", scheme="pact"), "1-bit weights"),
        (lambda: QuantSpec(4, 4, edge_bits=1), "1-bit edge layers"),
        (lambda: TrainConfig(method="pact", bits="W4A32", init="x"), "a clipping level"),
        (lambda: TrainConfig(method="fpq", quantizer="lsq+", bits="W4A32", init="x"), "an offset"),
        (lambda: TrainConfig(method="noise-features", bits="W4A32", init="x"), "noise of half a quantization step"),
        (lambda: TrainConfig(method="fpq", bits="W4A32", init="x"), "W4A32 leaves in floating point.*--sfp-p 0"),
        (lambda: TrainConfig(method="noise-weights", bits="W32A4", init="x"), "to the weights"),
        (lambda: TrainConfig(method="fpq", quantizer="pac", bits="W4A4", init="x"), "did you mean 'pact'"),
        (lambda: TrainConfig(quantizer="pact"), "leave --bits and --quantizer out"),
        (lambda: TrainConfig(sfp_site="behind"), "Known: after, before"),
        (lambda: TrainConfig(kd_temperature=0), "above zero"),
        (lambda: TrainConfig(sam_rho=-1), "not be negative"),
    ],
)
def test_what_is_not_defined_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_fpq_without_its_noise_needs_no_steps_of_inputs():
    assert TrainConfig(method="fpq", bits="W4A32", init="x", sfp_p=0).spec.act_bits == 32


# Parts of training ----------------------------------------------------------------------------------------------------


def test_distillation_of_logits_in_plain_numpy():
    s, t = (np.random.default_rng(i).normal(0, 2, (6, 10)) for i in (0, 1))
    for temperature in (1.0, 4.0):
        p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True) for z in (t, s))
        truth = temperature**2 * (p * np.log(p / q)).sum(1).mean()
        ours = kd_loss(torch.from_numpy(s), torch.from_numpy(t), temperature)
        assert float(ours) == pytest.approx(truth, rel=1e-10)


def test_sam_takes_the_gradient_up_the_hill():
    model, x = calibrated("lsq")
    y = torch.randint(10, (16,))
    F.cross_entropy(model(x), y).backward()
    own = {id(p) for p in quantizer_parameters(model)}
    weights = {name: p for name, p in model.named_parameters() if id(p) not in own}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient = {name: p.grad.clone() for name, p in weights.items()}
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    with ascended(model, 0.05):
        for name, p in model.named_parameters():
            if name in weights:
                torch.testing.assert_close(p, before[name] + 0.05 / norm * gradient[name])
            else:
                assert torch.equal(p, before[name])
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())
    name = "3.parametrizations.weight.original"
    assert not torch.equal(weights[name].grad, gradient[name])
    model(x)
    assert not torch.equal(model[1].running_mean, statistics["1.running_mean"])  # tracked again


def test_noise_in_the_weights():
    model, _ = calibrated("lsq")
    model.train()
    clean = {i: model[i].weight.detach().clone() for i in (0, 3, 6, 11)}
    with WeightPerturbation(model, torch.Generator().manual_seed(0)):
        for i in (0, 3, 6):
            step = model[i].parametrizations.weight[0].step_size
            d = ((model[i].weight - clean[i]) / step).detach()
            assert d.abs().max() <= 0.5 + 1e-3
            assert float(d.var()) == pytest.approx(1 / 12, rel=0.3)
            assert not torch.equal(model[i].weight, model[i].weight)  # drawn anew
        assert torch.equal(model[11].weight, clean[11])  # the classifier
        model.eval()
        assert torch.equal(model[3].weight, clean[3])
    model.train()
    assert torch.equal(model[3].weight, clean[3])


def test_noise_before_the_quantizer_is_stochastic_rounding():
    """The convolution still gets values of the grid, at most a step away, and right on average."""
    model, x = calibrated("lsq")
    model.train()
    seen = []
    x = 0.3 * torch.rand(1, 1, 8, 8).expand(2000, 1, 8, 8)
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    with StochasticFeaturePerturbation(model, 1.0, *generators, site="before"):
        handle = model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        model(x)
        handle.remove()
    step = float(model[0].input_quantizer.step_size.detach())
    k = seen[0] / step
    torch.testing.assert_close(k, k.round(), atol=1e-3, rtol=0)
    assert (seen[0] - x).abs().max() <= step * 1.001
    assert (seen[0].mean(0) - x[0]).abs().max() < 5 * step * 0.5 / math.sqrt(2000)


def test_sfp_and_csd_compose_with_every_scheme():
    for scheme in SCHEMES:
        model, x = calibrated(scheme)
        model.train()
        generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        clean = model(x)
        with StochasticFeaturePerturbation(model, 1.0, *generators) as sfp:
            assert len(sfp.sites) == 3
            assert not torch.equal(model(x), clean)


def test_eq_9_and_15_to_17_in_plain_numpy():
    """Noise at one convolution, and the distance of what comes out to what the teacher gives there."""
    model, x = calibrated("lsq")
    model.train()
    generator = torch.Generator().manual_seed(3)
    with StochasticFeaturePerturbation(model, 1.0, torch.Generator().manual_seed(0), generator):
        noisy = nn.Sequential(*list(model)[:1])(x).detach()
    quantizer = model[0].input_quantizer
    s = float(quantizer.step_size.detach())
    delta = torch.empty(x.shape).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3)).numpy() * s
    k = np.clip(np.round(x.numpy() / s) + float(quantizer.zero_point), 0, 255) - float(quantizer.zero_point)
    padded = np.pad(k * s + delta, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    truth = np.einsum("nchwij,ocij->nohw", windows, model[0].weight.detach().numpy())
    np.testing.assert_allclose(noisy.numpy(), truth, atol=2e-5)

    teacher = np.random.default_rng(0).normal(size=truth.shape).astype(np.float32)
    over = {"axis": (0, 2, 3), "keepdims": True}
    ours, theirs = ((z - z.mean(**over)) / np.sqrt(z.var(**over) + EPS) for z in (truth, teacher))
    distance = csd_loss([noisy], [torch.from_numpy(teacher)], "sum")
    assert float(distance) == pytest.approx(((ours - theirs) ** 2).sum(), rel=1e-4)


# Proposition 1 --------------------------------------------------------------------------------------------------------


class Curved(nn.Module):
    """A quantized convolution and a smooth curve: the noise's mean is zero in front of it, not behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 3, 1)
        self.edge = nn.Linear(3, 3)  # so that the convolution is not the last layer

    def forward(self, x):
        return F.softplus(self.conv(x))


def test_proposition_1_the_mean_is_half_the_trace_term():
    """E[f(x + d) - f(x)] = 1/2 sum_i f''_ii s^2 / 12 + O(s^4), for every output."""
    model = Curved()
    with torch.no_grad():
        model.conv.weight *= 2
    model = quantize(model, QuantSpec(32, 3, edge_bits=3))
    x = torch.randn(1, 4, 1)
    model.conv.input_quantizer.calibrate(x, "minmax")
    model.edge.input_quantizer.calibrate(x, "minmax")
    model.train()
    with torch.no_grad():
        clean = model(x)[0, :, 0]
    n = 300_000
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    with StochasticFeaturePerturbation(model, 1.0, *generators), torch.no_grad():
        moves = model(x.expand(n, -1, -1))[:, :, 0] - clean
    mean, error = moves.mean(0), moves.std(0) / math.sqrt(n)
    at = model.conv.input_quantizer(x)[0, :, 0].detach()
    s = float(model.conv.input_quantizer.step_size.detach())
    for j in range(3):
        curve = torch.func.hessian(lambda v, j=j: F.softplus(model.conv.weight[j, :, 0] @ v + model.conv.bias[j]))(at)
        expected = float(curve.trace().detach()) / 2 * s**2 / 12
        assert float(mean[j]) == pytest.approx(expected, abs=4 * float(error[j]) + 0.05 * expected)
        assert float(mean[j]) > 4 * float(error[j])


class Chain(nn.Module):
    """Identity convolutions, and an output that is moved only if the noise is on at all of them."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(1, 1, 1, bias=False) for _ in range(n))
        for conv in self.convs:
            nn.init.ones_(conv.weight)

    def forward(self, x):
        out = torch.ones_like(x)
        for conv in self.convs:
            out = out * (conv(x) - x) ** 2
        return out


@pytest.mark.parametrize("n", [1, 2, 3])
def test_what_needs_noise_in_all_layers_falls_as_p_to_the_n(n):
    """Eq. 14.  What one layer alone gives falls as p only; it is the joint effect of N that falls as p^N."""
    model = quantize(Chain(n), QuantSpec(32, 4, edge_bits=4))
    x = torch.zeros(1, 1, 4000)
    for conv in model.convs:
        conv.input_quantizer.calibrate(torch.linspace(-1, 1, 50), "minmax")
    model.train()
    s = float(model.convs[0].input_quantizer.step_size.detach())
    for p in (1.0, 0.5, 0.25):
        generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        steps = 1 if p == 1 else 600
        with StochasticFeaturePerturbation(model, p, *generators), torch.no_grad():
            means = torch.stack([model(x[..., : 4000 if p == 1 else 200]).mean() for _ in range(steps)])
        spread = 4 * math.sqrt(p**n * (1 - p**n) / steps)  # four standard errors of the gates' share
        assert float(means.mean()) / (s**2 / 12) ** n == pytest.approx(p**n, abs=spread + 0.08 * p**n)


# Scales that do not run away ------------------------------------------------------------------------------------------


def test_a_scale_changes_little_in_a_step_and_stays_positive():
    model, _ = calibrated("lsq")
    optimizer = loop.make_optimizer(TrainConfig(lr=0.1), model)
    project = ScaleProjection(model, optimizer)
    steps = model[3].parametrizations.weight[0].step_size
    gradient = torch.tensor([1e3, -1e3, *[1e-6] * 6]).view_as(steps)
    before = steps.detach().clone()
    steps.grad = gradient
    optimizer.step()
    project()
    after = steps.detach()
    torch.testing.assert_close(after[0], before[0] / MAX_CHANGE)
    torch.testing.assert_close(after[1], before[1] * MAX_CHANGE)
    assert torch.equal(after[2:], before[2:] - 0.1 * gradient[2:])  # untouched
    velocity = optimizer.state[steps]["momentum_buffer"]
    torch.testing.assert_close(velocity[:2], (before - after)[:2] / 0.1)
    assert torch.equal(velocity[2:], gradient[2:])
    for _ in range(200):
        optimizer.step()
        project()
    assert (steps > 0).all()


def test_no_step_of_training_throws_a_scale_away(tiny_runs, tmp_path, monkeypatch):
    """Whatever its gradient: a step size went from 0.002 through zero to 6, and its channel died."""
    made, ratios = loop.make_optimizer, []

    def wild(config, model):
        optimizer = made(config, model)
        step, scales = optimizer.step, quantizer_parameters(model)
        before = [p.detach().clone() for p in scales]

        def push():
            ratios.extend(p.detach() / q for p, q in zip(scales, before, strict=True))
            for p, q in zip(scales, before, strict=True):
                q.copy_(p.detach())
                p.grad *= 1e4
            step()

        optimizer.step = push
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", wild)
    config = TrainConfig(
        model="tests.nets:tiny",
        method="lsq",
        bits="W4A4",
        init=str(tiny_runs / "fp"),
        epochs=1,
        batch_size=256,
        lr=0.02,
    )
    train(config, tmp_path / "run", device="cpu", log=quiet)
    moved = torch.cat([ratio.flatten() for ratio in ratios])
    assert len(ratios) == 5 * 8
    assert float(moved.max()) == pytest.approx(MAX_CHANGE)  # the bound was met, and not passed
    assert float(moved.min()) == pytest.approx(1 / MAX_CHANGE)


# Through the trainer --------------------------------------------------------------------------------------------------


class Runs:
    """Two epochs of every method from one teacher, trained when they are first asked for."""

    def __init__(self, root, teacher):
        self.root = root
        self.teacher = str(teacher)

    def __truediv__(self, name):
        if not (self.root / name).exists():
            settings = {"method": "fpq", "quantizer": "pact", "sfp_site": "before"} if name == "fpq-pact" else {}
            config = TrainConfig(**{"method": name, "init": self.teacher, **COMMON, **settings})
            train(config, self.root / name, device="cpu", log=quiet)
        return self.root / name


@pytest.fixture(scope="module")
def runs(tiny_runs, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("methods"), tiny_runs / "fp")


@pytest.mark.parametrize("method", [*QUANTIZED, "fpq-pact"])
def test_every_method_moves_its_own_parameters(runs, method):
    first, last = (read_checkpoint(runs / method / f"epoch_000{i}.pt") for i in (0, 2))
    model = last.build("tests.nets:tiny")
    own = {id(p) for p in quantizer_parameters(model)}
    names = [name for name, p in model.named_parameters() if id(p) in own]
    kinds = {name.rpartition(".")[2] for name in names}
    pact = method in ("pact", "fpq-pact")
    assert kinds == ({"alpha"} if pact else {"step_size", "offset"} if method == "lsq+" else {"step_size"})
    if method == "lsq+":
        # The digits' 17 grey values lie on the 8-bit grid of a free offset: there is nothing left to learn.
        names = [name for name in names if not name.startswith("0.input_quantizer")]
    for name in names:
        assert not torch.equal(first.state_dict[name], last.state_dict[name]), name
        assert name.endswith("offset") or (last.state_dict[name] > 0).all()
    rows = read_jsonl(runs / method / "train.jsonl")
    parts = {key.removeprefix("loss_"): value for key, value in rows[-1].items() if key.startswith("loss_")}
    assert set(parts) == TERMS.get(method, set(parts))  # those of a method that was added are not known here
    assert all(parts.values())
    assert rows[-1]["loss"] == pytest.approx(sum(parts.values()))
    x = torch.randn(8, 1, 8, 8)
    again = load(runs / method / "epoch_0002.pt", model="tests.nets:tiny")
    assert torch.equal(again(x), model(x))
    assert len(inspect_quantizers(runs / method / "epoch_0002.pt")) == 8


def test_reports_of_an_epoch(runs):
    rows = read_jsonl(runs / "lsq" / "train.jsonl")
    models = [load(runs / "lsq" / f"epoch_000{i}.pt", model="tests.nets:tiny") for i in range(3)]
    codes = [weight_codes(model) for model in models]
    for epoch in (1, 2):
        assert rows[epoch]["oscillating_fraction"] == changed_fraction(codes[epoch - 1], codes[epoch])
        assert rows[epoch]["step_sizes"] == step_sizes(models[epoch])
    assert set(rows[1]["step_sizes"]) == {f"{i}.{of}" for i in (0, 3, 6, 11) for of in ("weight", "input")}
    assert changed_fraction(codes[1], codes[1]) == 0
    assert changed_fraction(codes[1], {name: (code + 1) % 4 for name, code in codes[1].items()}) == 1
    assert changed_fraction({}, {}) == 0
    assert step_sizes(tiny()) == {}


@pytest.mark.parametrize("method", QUANTIZED)
def test_the_student_starts_as_its_calibrated_teacher(runs, tiny_runs, method):
    """The teacher's weights and statistics; and at eight bits a network's outputs are those without."""
    teacher = load(tiny_runs / "fp" / "epoch_0002.pt", model="tests.nets:tiny")
    state = read_checkpoint(runs / method / "epoch_0000.pt").state_dict
    for name, value in teacher.state_dict().items():
        mine = state[name] if name in state else state[name.replace(".weight", ".parametrizations.weight.original")]
        assert torch.equal(mine, value)
    scheme = METHODS[method].quantizer
    teacher, x = tiny().eval(), torch.randn(64, 1, 8, 8)
    student = quantize(teacher, QuantSpec.parse("W8A8", scheme=scheme))
    calibrate(student, x, "minmax")
    error = (student.eval()(x) - teacher(x)).norm() / teacher(x).norm()
    # DoReFa bends weights by tanh, whatever the bits.
    assert error < (0.5 if scheme == "pact" else 0.05)


@pytest.mark.parametrize("method", ["sam", "kd"])
def test_killed_and_resumed_is_bit_identical(runs, tiny_runs, tmp_path, monkeypatch, method):
    """Killed in the middle of the second epoch."""
    config = TrainConfig(method=method, init=str(tiny_runs / "fp"), **COMMON)
    optimizer, calls = loop.make_optimizer, []

    def dying(config, model):
        made = optimizer(config, model)
        step = made.step

        def count(*args, **kwargs):
            calls.append(1)
            if len(calls) == 30:  # 22 batches of 64 in an epoch
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        made.step = count
        return made

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_optimizer", dying)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", device="cpu", log=quiet)
    assert list(Run(tmp_path / "run").checkpoints) == [0, 1]
    train(config, tmp_path / "run", device="cpu", resume=True, log=quiet)
    for epoch in range(3):
        a, b = (read_checkpoint(run / f"epoch_000{epoch}.pt") for run in (runs / method, tmp_path / "run"))
        assert a.state_dict.keys() == b.state_dict.keys()
        assert all(torch.equal(value, b.state_dict[name]) for name, value in a.state_dict.items())


def test_checkpoints_without_a_scheme_are_lsq(runs, tmp_path):
    content = torch.load(runs / "lsq" / "epoch_0002.pt", weights_only=True)
    del content["quant"]["scheme"]
    torch.save(content, tmp_path / "epoch_0002.pt")
    x = torch.randn(8, 1, 8, 8)
    old, new = (load(folder / "epoch_0002.pt", model="tests.nets:tiny") for folder in (tmp_path, runs / "lsq"))
    assert torch.equal(old(x), new(x))


def test_a_run_of_an_older_version_is_resumed(runs, tiny_runs, tmp_path):
    """Its run.json lacks the newer settings."""
    import json
    import shutil

    shutil.copytree(runs / "lsq", tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    for key in ("quantizer", "sam_rho", "sfp_site"):
        del about["config"][key]
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    config = TrainConfig(method="lsq", init=str(tiny_runs / "fp"), **COMMON)
    assert len(train(config, tmp_path / "run", device="cpu", resume=True, log=quiet)) == 3


def test_options_reach_training(tiny_runs, tmp_path):
    """FPQ with p = 0 and weight 0 is LSQ, and so is SAM that does not climb: one step tells."""
    short = {**COMMON, "epochs": 1, "batch_size": 10_000, "init": str(tiny_runs / "fp")}
    configs = {
        "lsq": TrainConfig(method="lsq", **short),
        "fpq0": TrainConfig(method="fpq", sfp_p=0, csd_weight=0, **short),
        "sam0": TrainConfig(method="sam", sam_rho=0, **short),
        "kd0": TrainConfig(method="kd", kd_weight=0, **short),
        "sfp": TrainConfig(method="fpq", csd_weight=0, **short),
        "csd": TrainConfig(method="fpq", sfp_p=0, **short),
        "sam": TrainConfig(method="sam", **short),
        "kd": TrainConfig(method="kd", kd_temperature=4, **short),
        "before": TrainConfig(method="fpq", csd_weight=0, sfp_site="before", **short),
    }
    ends, weight = {}, "3.parametrizations.weight.original"
    for name, config in configs.items():
        train(config, tmp_path / name, device="cpu", log=quiet)
        ends[name] = read_checkpoint(tmp_path / name / "epoch_0001.pt").state_dict[weight]
    step = float((ends["lsq"] - read_checkpoint(tmp_path / "lsq" / "epoch_0000.pt").state_dict[weight]).norm())
    away = {name: float((w - ends["lsq"]).norm()) for name, w in ends.items()}
    assert [name for name, d in away.items() if d < 1e-2 * step] == ["lsq", "fpq0", "sam0", "kd0"]
    assert float((ends["sfp"] - ends["before"]).norm()) > 1e-2 * step
