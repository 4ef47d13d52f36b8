"""The exact trace against the dense Hessian, and what keeps it from being used where it does not hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fpq_analysis import QuantSpec, UserError, calibrate, hessian_trace, quantize
from fpq_analysis.choices import DEFINITIONS
from fpq_analysis.curvature import NotExactError, as_batches, certify, per_sample_traces
from fpq_analysis.losses.cross_entropy import CROSS_ENTROPY
from fpq_analysis.losses.softmax import draw, factor
from fpq_analysis.quantizers import variables, view
from tests.nets import OUTSIDE, Product, dense_hessian, networks, tiny


def dense_traces(model: nn.Module, definition: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    seen = view(model, definition)
    names = variables(seen)
    diagonal = dense_hessian(seen, list(names.values()), x, y).diagonal()
    traces: dict[str, float] = {}
    for name, part in zip(names, diagonal.split([p.numel() for p in names.values()]), strict=True):
        layer = name.rpartition(".")[0]
        traces[layer] = traces.get(layer, 0.0) + float(part.sum())
    return traces


@given(networks(), st.sampled_from(["W32A32", "W8A8", "W4A4", "W2A2"]), st.sampled_from(["mse", "minmax"]))
def test_exact_equals_dense(net, bits, how):
    model, x, y = net
    spec = QuantSpec.parse(bits, weight_calibration=how, act_calibration=how)
    # The edge layers too: on networks this small they are most of the weights.
    spec = QuantSpec(**{**vars(spec), "edge_bits": min(8, spec.weight_bits)})
    if bits != "W32A32":
        model = quantize(model, spec).double()
        calibrate(model, x, how)
    for definition in DEFINITIONS:
        truth = dense_traces(model, definition, x, y)
        ours = hessian_trace(model, as_batches((x, y), 3), method="auto", definition=definition)
        assert ours.method == "exact", ours.reason
        total = sum(truth.values())
        assert ours.value == pytest.approx(total, rel=1e-10, abs=1e-13)
        assert set(ours.per_layer) == set(truth)
        for layer, value in truth.items():
            assert ours.per_layer[layer] == pytest.approx(value, rel=1e-10, abs=1e-10 * abs(total) + 1e-13)
        assert ours.sem == 0
        assert ours.n_data == len(x)
        assert ours.per_sample.mean() == pytest.approx(ours.value, rel=1e-12)


def test_per_sample_is_each_samples_own_trace():
    model = tiny(4).double().eval()
    x, y = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    together = hessian_trace(model, (x, y), method="exact")
    alone = [hessian_trace(model, (x[i : i + 1], y[i : i + 1]), method="exact").value for i in range(5)]
    np.testing.assert_allclose(together.per_sample, alone, rtol=1e-12)
    assert together.sem_data == pytest.approx(np.std(alone, ddof=1) / 5**0.5)


def test_patches_and_gram_matrices_agree(monkeypatch):
    """Both forms of a layer's norm, whichever the sizes would choose."""
    from fpq_analysis.curvature import layers

    model = tiny(4).double().eval()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    chosen = []
    original = layers._Seen.__init__

    def forced(self, *args):
        original(self, *args)
        chosen.append(self.gram)
        if self.gram:
            self.gram = False
            self.patches = layers._patches(self.layer, args[1])

    automatic = hessian_trace(model, (x, y), method="exact").value
    monkeypatch.setattr(layers._Seen, "__init__", forced)
    explicit = hessian_trace(model, (x, y), method="exact").value
    assert True in chosen
    assert False in chosen
    assert automatic == pytest.approx(explicit, rel=1e-12)


@pytest.mark.parametrize("build", OUTSIDE)
def test_outside_the_condition_is_recognised(build):
    model = build().double()
    data = (torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,)))
    ours = hessian_trace(model, data, n_products=10)
    assert ours.method == "deflated"
    assert "not exact" in ours.reason
    for method in ("exact", "sampled"):
        with pytest.raises(UserError, match="does not hold"):
            hessian_trace(model, data, method=method)


def test_product_of_two_branches_is_inside():
    model = Product().double()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    ours = hessian_trace(model, (x, y))
    assert ours.method == "exact"
    assert ours.value == pytest.approx(sum(dense_traces(model, "float", x, y).values()), rel=1e-10)


def test_transposed_convolution_and_bare_parameters_are_not_exact():
    transposed = nn.Sequential(nn.ConvTranspose2d(1, 2, 2), nn.Flatten(), nn.Linear(2 * 81, 3))
    x = torch.randn(3, 1, 8, 8)
    with pytest.raises(NotExactError, match="ConvTranspose2d"):
        certify(transposed.eval(), [(x, torch.zeros(3))], variables(transposed))


@given(st.integers(2, 12), st.integers(0, 1000), st.sampled_from([1.0, 30.0, 1000.0]))
def test_factor_of_the_softmax_covariance(n_classes, seed, scale):
    logits = scale * torch.randn(6, n_classes, generator=torch.Generator().manual_seed(seed))
    for dtype in (torch.float32, torch.float64):
        columns = factor(logits.to(dtype))
        assert columns.shape == (n_classes - 1, 6, n_classes)
        assert torch.isfinite(columns).all()
        p = logits.to(dtype).softmax(1)
        truth = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(torch.einsum("knc,knd->ncd", columns, columns), truth, atol=tolerance, rtol=0)


def test_saturated_logits_have_a_finite_trace():
    """Probabilities that underflow: their products did so first and gave NaN."""
    model = nn.Linear(4, 6)
    with torch.no_grad():
        model.weight.mul_(500)
    ours = hessian_trace(model, (torch.randn(20, 4), torch.randint(6, (20,))), method="exact")
    assert np.isfinite(ours.per_sample).all()


def test_drawn_labels_have_the_right_second_moment():
    logits = 2 * torch.randn(1, 4, dtype=torch.float64)
    uniforms = torch.rand(1, 40_000, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)[0]
    for balanced in (False, True):
        draws = draw(logits, uniforms, balanced)[:, 0]
        torch.testing.assert_close(draws.T @ draws / len(draws), p.diag() - p.outer(p), atol=5e-3, rtol=0)
    assert draws.norm(dim=1).std() < 1e-12  # balanced: all of one length


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_drawn_labels_of_saturated_and_flat_logits_are_finite(scale):
    logits = scale * torch.randn(50, 5)
    uniforms = torch.cat([torch.zeros(50, 1), torch.full((50, 1), 1 - 2**-24), torch.rand(50, 3)], 1)
    for balanced in (False, True):
        assert draw(logits, uniforms, balanced).isfinite().all()


def test_sampled_interval_covers_the_exact_trace():
    model = tiny(10).eval()
    data = (torch.randn(40, 1, 8, 8), torch.randint(10, (40,)))
    truth = hessian_trace(model, data, method="exact").value
    inside = 0
    for seed in range(60):
        ours = hessian_trace(model, data, method="sampled", n_labels=16, seed=seed)
        assert ours.n_products == 16
        inside += abs(ours.value - truth) < 1.96 * ours.sem
    # Binomial(60, 0.95): 52 or fewer has a probability of 1 %.
    assert inside >= 53


def test_sampled_reaches_a_tolerance():
    model = tiny(10).eval()
    data = (torch.randn(40, 1, 8, 8), torch.randint(10, (40,)))
    ours = hessian_trace(model, data, method="sampled", tol=0.05)
    assert ours.converged
    assert 0 < ours.sem <= 0.05 * ours.value


def test_many_classes_are_sampled():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30)).eval()
    ours = hessian_trace(model, (torch.randn(10, 1, 8, 8), torch.randint(30, (10,))))
    assert ours.method == "sampled"
    assert "29 backward passes" in ours.reason


def test_in_place_activations_do_not_disturb(monkeypatch):
    def build(inplace):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(inplace),
            nn.Conv2d(3, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace),
            nn.Flatten(),
            nn.Linear(48, 3),
        ).double()

    data = (torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    a, b = (hessian_trace(build(inplace), data, method="exact") for inplace in (True, False))
    assert a.per_layer == pytest.approx(b.per_layer, rel=1e-12)


def test_the_model_is_left_as_it_was():
    model = quantize(tiny(10), QuantSpec.parse("W4A4"))
    x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    calibrate(model, x, "mse")
    model.train()
    nn.functional.cross_entropy(model(x), y).backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: p.grad.clone() for k, p in model.named_parameters()}
    rng = torch.random.get_rng_state()
    model[0].eval()  # an odd mix of modes must survive too
    modes = [m.training for m in model.modules()]
    for definition in DEFINITIONS:
        for method in ("exact", "sampled", "hutchinson", "deflated", "xtrace", "pyhessian"):
            hessian_trace(model, (x, y), definition=definition, method=method, n_products=2)
    assert torch.equal(rng, torch.random.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert all(torch.equal(g, dict(model.named_parameters())[k].grad) for k, g in grads.items())
    assert all(p.requires_grad for p in model.parameters())
    model(x)  # its layers still work: the copies share nothing with it


def test_data_in_any_form_give_the_same():
    model = tiny(3).double().eval()
    x, y = torch.randn(10, 1, 8, 8, dtype=torch.float64), torch.randint(3, (10,))
    whole = hessian_trace(model, (x, y)).value
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    ragged = [(x[:7], y[:7]), (x[7:], y[7:])]
    for batches in (loader, ragged, iter(ragged)):
        assert hessian_trace(model, batches).value == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no data"),
        ([torch.zeros(3)], "pair"),
        ((torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.long)), "3 inputs and 2 targets"),
    ],
)
def test_bad_batches(batches, message):
    with pytest.raises(UserError, match=message):
        hessian_trace(tiny(), batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exakt"}, "did you mean 'exact'"),
        ({"definition": "lattent"}, "did you mean 'latent'"),
        ({"loss": "mse"}, "Unknown loss"),
        ({"tol": 0.0}, "above zero"),
        ({"method": "exact", "loss": nn.functional.multi_margin_loss}, "not known in closed form"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        hessian_trace(tiny(), (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)), **options)


def test_nan_inputs_are_an_error_not_a_number():
    x = torch.full((2, 1, 8, 8), torch.nan)
    with pytest.raises(UserError, match="not finite"):
        hessian_trace(tiny(), (x, torch.zeros(2, dtype=torch.long)))


def test_per_sample_traces_need_no_labels():
    model = tiny(3).eval()
    x = torch.randn(4, 1, 8, 8)
    a, b = (
        next(per_sample_traces(model, CROSS_ENTROPY, [(x, torch.full((4,), label))], variables(model)))["0.weight"]
        for label in (0, 2)
    )
    assert torch.equal(a, b)


def dense_total(model, x, y):
    return float(dense_hessian(model, list(model.parameters()), x, y).trace())


def test_curvature_that_hides_from_the_first_images():
    """Blank images in front: nothing bends there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.GELU(), nn.Linear(5, 3, bias=False)).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    x[:30] = 0
    assert hessian_trace(model, (x, y), n_products=10).method == "deflated"


def test_activations_that_saturate_on_most_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Hardswish(), nn.Linear(5, 3)).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    x[:10] *= 1000
    assert hessian_trace(model, (x, y), n_products=10).method == "deflated"


def test_a_dead_layer_counts_as_zero():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    ours = hessian_trace(model, (x, y))
    assert ours.method == "exact"
    assert ours.per_layer["0"] == 0
    assert ours.value == pytest.approx(dense_total(model, x, y), rel=1e-10)


def test_a_layer_that_only_wakes_on_one_image():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    with torch.no_grad():
        model[0].bias.fill_(-3)
    x, y = 0.1 * torch.randn(50, 6, dtype=torch.float64), torch.randint(3, (50,))
    x[49] *= 60
    ours = hessian_trace(model, (x, y))
    assert ours.method == "exact"
    assert ours.per_layer["0"] > 0
    assert ours.value == pytest.approx(dense_total(model, x, y), rel=1e-10)


@pytest.mark.parametrize("mix", [lambda h: h - h.mean(0), lambda h: h * h.roll(1, 0)])
def test_models_that_mix_samples_are_refused(mix):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.second(mix(self.first(x)))

    for method in ("auto", "exact", "hutchinson"):
        with pytest.raises(UserError, match="depends on the others"):
            hessian_trace(Mixing(), (torch.randn(8, 6), torch.randint(3, (8,))), method=method)


def test_rounding_that_depends_on_the_size_of_the_batch_is_no_mixing():
    class Rounding(nn.Module):
        """A level that the last digit decides, which is another in larger batches."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            level = (0.5 + x[:, :1].abs() + 1e-7 * (len(x) > 1)).floor() - 0.5
            return self.linear(x) * (1 + level)

    x = torch.randn(8, 6)
    x[:, 0] = 0.5 - 5e-8
    model = Rounding()
    assert float((model(x)[:1] - model(x[:1])).abs().max()) > 0.1
    assert hessian_trace(model, (x, torch.randint(3, (8,)))).value > 0


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (torch.full((8,), -100), "No target counts"),
        (torch.full((8,), 3), "from 3 to 3"),
        (torch.rand(8, 3), "no probabilities"),
        (torch.rand(8), "whole-number targets"),
    ],
)
def test_targets_that_are_no_classes_are_refused(y, said):
    with pytest.raises(UserError, match=said):
        hessian_trace(nn.Linear(6, 3), (torch.randn(8, 6), y))


class Folded(nn.Module):
    """Batch and time in one axis."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.inner(x.reshape(-1, 3))).reshape(len(x), 8))


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(input=x)


class Backbone(nn.Module):
    """A part that is switched off from gradients."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            h = self.body(x)
        return self.head(h)


@pytest.mark.parametrize("build", [Folded, Keyword, Backbone])
def test_unusual_forward_passes_fall_back(build):
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    model = build().double()
    ours = hessian_trace(model, (x, y), n_products=400)
    assert ours.method == "deflated"
    dense = dense_hessian(model, [p for n, p in model.named_parameters() if "body" not in n], x, y).trace()
    assert abs(ours.value - float(dense)) < 4 * ours.sem + 1e-12


def test_other_shapes_of_layers():
    """Sequences: a linear layer on a 3-D input, Conv1d, BatchNorm1d; and volumes."""

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 3, 3, padding=1, bias=False), nn.BatchNorm1d(3)
            self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = torch.relu(self.norm(self.conv(x))).transpose(1, 2)
            return self.head(torch.relu(self.inner(h)).mean(1))

    volume = nn.Sequential(nn.Conv3d(1, 2, 2, stride=2), nn.ReLU(), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(16, 3))
    for model, x in ((Sequence(), torch.randn(5, 2, 7)), (volume, torch.randn(5, 1, 4, 4, 4))):
        model, x, y = model.double().eval(), x.double(), torch.randint(3, (5,))
        ours = hessian_trace(model, (x, y))
        assert ours.method == "exact", ours.reason
        assert ours.value == pytest.approx(dense_total(model, x, y), rel=1e-10)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2"])
def test_auto_is_exact_for_the_shipped_models(name):
    from fpq_analysis.models import build_model

    x, y = torch.randn(4, 1, 8, 8), torch.randint(5, (4,))
    model = quantize(build_model(name, 5, 1), QuantSpec.parse("W4A4", weight_calibration="minmax"))
    calibrate(model, x, "minmax")
    ours = hessian_trace(model, (x, y))
    assert ours.method == "exact", ours.reason


def test_float32_agrees_with_float64():
    model = tiny(10).eval()
    x, y = torch.randn(20, 1, 8, 8), torch.randint(10, (20,))
    single, double = hessian_trace(model, (x, y)).value, hessian_trace(model.double(), (x.double(), y)).value
    assert single == pytest.approx(double, rel=1e-5)


def test_a_model_that_is_one_quantized_layer():
    model = quantize(nn.Linear(6, 3), QuantSpec(2, 2, 2, "mse", "mse")).double()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    calibrate(model, x, "mse")
    with torch.no_grad():
        model.parametrizations.weight.original[0] *= 10  # clipped
    truth = dense_traces(model, "latent", x, y)
    ours = hessian_trace(model, (x, y), definition="latent")
    assert ours.clipped_fraction > 0
    assert ours.value == pytest.approx(sum(truth.values()), rel=1e-10)


@pytest.mark.simulation
def test_the_error_over_the_data_covers_the_trace_of_all():
    """`sem_data` of samples of 60 images out of 2,000, as the population."""
    model = tiny(10).eval()
    x = torch.randn(2000, 1, 8, 8)
    x = x * torch.rand(2000, 1, 1, 1)
    everything = hessian_trace(model, (x, torch.zeros(2000, dtype=torch.long)), method="exact").per_sample
    inside = 0
    for seed in range(200):
        chosen = np.random.default_rng(seed).choice(2000, 60)
        part = hessian_trace if seed < 3 else None
        sample = everything[chosen]
        value, sem = sample.mean(), sample.std(ddof=1) / 60**0.5
        if part is not None:  # the same numbers from the call itself
            ours = part(model, (x[chosen], torch.zeros(60, dtype=torch.long)), method="exact")
            assert (ours.value, ours.sem_data) == pytest.approx((value, sem), rel=1e-4)
        inside += abs(value - everything.mean()) < 2 * sem
    assert 0.90 * 200 <= inside <= 0.99 * 200


def test_tf32_and_autocast_are_off_inside_and_back_after():
    from fpq_analysis.curvature.batches import full_precision

    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [place.fp32_precision for place in places]
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
            assert not torch.is_autocast_enabled("cpu")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    assert [place.fp32_precision for place in places] == before


def test_the_loss_in_its_usual_forms():
    model, data = tiny(3), (torch.randn(6, 1, 8, 8), torch.randint(3, (6,)))
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    for loss in ("cross_entropy", nn.functional.cross_entropy, nn.CrossEntropyLoss(), smoothed):
        assert hessian_trace(model, data, loss=loss).method == "exact"
    unknown = hessian_trace(model, data, loss=lambda outputs, targets: smoothed(outputs, targets), n_products=2)
    assert unknown.method == "deflated"
    assert "not known in closed form" in unknown.reason


def test_a_dense_prediction():
    """(N, C, H, W) logits and (N, H, W) targets: of 2 * 25 passes, a few are drawn."""
    model, x, y = nn.Conv2d(1, 3, 3, padding=1).double(), torch.randn(4, 1, 5, 5).double(), torch.randint(3, (4, 5, 5))
    ours = hessian_trace(model, (x, y), n_labels=50)
    assert ours.method == "sampled"
    truth = dense_total(model, x, y)
    assert abs(ours.value - truth) < 4 * ours.sem
    exact = hessian_trace(model, (x, y), method="exact")
    assert exact.n_products == 50
    assert exact.value == pytest.approx(truth, rel=1e-10)
