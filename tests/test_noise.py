"""Noise in the features: traces against dense Hessians, losses against an independent computation, errors honest."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from fpq_analysis import QuantSpec, UserError, calibrate, noise_response, quantize
from fpq_analysis.cli import app
from fpq_analysis.errors import NothingToDraw
from fpq_analysis.methods import SCHEMES
from fpq_analysis.plots import noise_caption, noise_figure
from fpq_analysis.probes.noise import NoiseResponse, _mean, _relative, _verdicts, controlled
from fpq_analysis.probes.noise_passes import _added, _Clean, _sites
from fpq_analysis.quantizers import FeatureNoise, view
from fpq_analysis.text import fraction
from tests.nets import Residual, tiny
from tests.results import table_of
from tests.test_records_and_plots import row
from tests.words import words


def network(bits="W4A4", n=6, n_classes=4, activation=nn.ReLU, scheme="lsq", seed=0):
    """A small quantized network in float64 with a residual sum, in eval mode, and data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        activation(),
        Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), activation())),
        nn.Conv2d(4, 3, 3, stride=2),
        activation(),
        nn.Flatten(),
        nn.Linear(12, n_classes),
    )
    x, y = torch.randn(n, 1, 5, 5), torch.randint(n_classes, (n,))
    model = quantize(model, QuantSpec.parse(bits, scheme=scheme, edge_bits=4))
    calibrate(model, torch.randn(64, 1, 5, 5), "mse")
    return model.double().eval(), x.double(), y


def cell(frame, quantity, layer="all", column="value"):
    return frame[(frame["layer"] == layer) & (frame["quantity"] == quantity)][column].item()


def dense_trace(model, name, x, y):
    """Trace of the Hessian of the mean loss in one layer's input: a second backward for every feature of it."""
    plain = view(model, "dequantized")
    layer = plain.get_submodule(name)
    deltas = []

    def shift(_, args):
        deltas.append(torch.zeros_like(args[0], requires_grad=True))
        return args[0] + deltas[0]

    with torch.enable_grad():
        handle = layer.register_forward_pre_hook(shift)
        loss = F.cross_entropy(plain(x), y, reduction="sum")
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, deltas, create_graph=True)
        total = 0.0
        for i, column in enumerate(gradient.flatten(1).unbind(1)):  # images do not mix
            (second,) = torch.autograd.grad(column.sum(), deltas, retain_graph=True)
            total += float(second.flatten(1)[:, i].sum())
    return total / len(x)


LAYERS = ["0", "3.body.0", "4"]


# The trace in feature space -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_layers_trace_is_that_of_the_dense_hessian(scheme):
    model, x, y = network(scheme=scheme)
    found = table_of(noise_response, model, (x, y), sizes=[1.0])
    sites = _sites(model)
    total = 0.0
    for layer in LAYERS:
        dense = dense_trace(model, layer, x, y)
        assert cell(found, "trace", layer) == pytest.approx(dense, rel=1e-9)
        assert cell(found, "trace", layer, "estimator") == "exact"
        share = float(sites[layer][1].step_size.detach()) ** 2 / 24 * dense
        assert cell(found, "predicted_1", layer) == pytest.approx(share, rel=1e-9)
        total += share
    assert set(found["layer"]) == {*LAYERS, "all"}
    assert cell(found, "predicted_1") == pytest.approx(total, rel=1e-9)
    assert cell(found, "predicted_1", column="sem") == 0
    assert cell(found, "predicted_1", column="n_products") == 3


def test_drawn_labels_for_many_classes():
    model, x, y = network(n_classes=25)
    found = table_of(noise_response, model, (x, y), sizes=[1.0])
    for layer in LAYERS:
        assert cell(found, "trace", layer, "estimator") == "sampled"
        dense, sem = dense_trace(model, layer, x, y), cell(found, "trace", layer, "sem")
        assert abs(cell(found, "trace", layer) - dense) < 4 * sem < 2 * dense
    assert "linear_1" not in set(found["quantity"])


def test_hutchinson_for_networks_that_are_not_piecewise_linear():
    model, x, y = network(activation=nn.GELU, n=40)
    found = table_of(noise_response, model, (x, y), sizes=[1.0])
    for layer in LAYERS:
        assert cell(found, "trace", layer, "estimator") == "hutchinson"
        dense, sem = dense_trace(model, layer, x, y), cell(found, "trace", layer, "sem")
        assert abs(cell(found, "trace", layer) - dense) < 4 * sem
        assert sem < 0.005


class Regression(nn.Module):
    """One convolution over the whole image: softmax regression on its quantized pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)

    def forward(self, x):
        return self.conv(x).flatten(1)


@pytest.fixture
def regression():
    model = quantize(Regression(), QuantSpec.parse("W8A4", edge_bits=4))
    x, y = torch.randn(40, 2, 3, 3), torch.randint(5, (40,))
    calibrate(model, x, "mse")
    return model.double().eval(), x.double(), y


def test_softmax_regression_in_closed_form(regression):
    model, x, y = regression
    found = table_of(noise_response, model, (x, y), sizes=[1 / 64])
    w = model.conv.weight.detach().flatten(1)
    p = model(x).softmax(1).detach()
    trace = float(((p @ w.square().sum(1)) - (p @ w).square().sum(1)).mean())
    assert cell(found, "trace", "conv") == pytest.approx(trace, rel=1e-12)
    # With nothing behind the layer to round or to bend, three of the numbers are one; and for weak noise, all four.
    size = "0.015625"
    for kind in ("surrogate", "real"):
        assert cell(found, f"{kind}_{size}") == pytest.approx(cell(found, f"linear_{size}"), rel=1e-6)
        assert cell(found, f"ratio_{kind}_{size}") == pytest.approx(1, abs=1e-3)
        assert cell(found, f"ratio_{kind}_{size}", column="ci95") < 1e-3
        assert abs(cell(found, f"interaction_{kind}")) < 1e-12
        assert cell(found, f"within_10_{kind}") > 0


def test_a_quadratic_loss_has_nothing_beyond_the_second_order(regression):
    model, x, y = regression
    found = table_of(noise_response, model, (x, y), loss=lambda z, _: z.square().sum(1).mean() / 2, sizes=[1, 2, 4])
    for size in (2, 4):
        assert cell(found, f"real_{size}") == pytest.approx(size**2 * cell(found, "real_1"), rel=1e-9)
    step = float(model.conv.input_quantizer.step_size.detach())
    expected = step**2 / 24 * float(model.conv.weight.detach().square().sum())
    assert cell(found, "real_1") == pytest.approx(expected, abs=4 * cell(found, "real_1", column="sem"))
    assert cell(found, "predicted_1") == pytest.approx(expected, abs=4 * cell(found, "predicted_1", column="sem"))


def test_a_linear_loss_has_an_odd_part_only(regression):
    model, x, y = regression
    found = table_of(noise_response, model, (x, y), loss=lambda z, _: z[:, 0].mean(), sizes=[1])
    assert abs(cell(found, "real_1")) < 1e-12
    assert 0 < abs(cell(found, "odd_1")) < 4 * cell(found, "odd_1", column="sem")


# The loss under noise -------------------------------------------------------------------------------------------------


def test_the_real_increase_is_that_of_the_trainers_noise():
    """Against plain draws of `FeatureNoise`, which is what training adds."""
    model, x, y = network("W3A3")
    found = table_of(noise_response, model, (x, y), sizes=[2.0], n_draws=150)
    plain = view(model, "dequantized")
    n = 1500
    many, labels = x.repeat_interleave(n, 0), y.repeat_interleave(n)
    with torch.no_grad():
        clean = F.cross_entropy(plain(x), y, reduction="none")
        for size in (1.0, 2.0):
            with FeatureNoise(plain, torch.Generator().manual_seed(1), size):
                losses = F.cross_entropy(plain(many), labels, reduction="none").view(len(x), n)
            increase = losses - clean[:, None]
            error = math.hypot(
                float(increase.std(1).mean()) / math.sqrt(n * len(x)), cell(found, f"real_{size:g}", column="sem")
            )
            assert abs(float(increase.mean()) - cell(found, f"real_{size:g}")) < 4 * error
            assert error < 0.3 * abs(float(increase.mean()))


def test_the_straight_through_network_holds_residues_and_clipping():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten())
    model = quantize(model, QuantSpec.parse("W4A3", edge_bits=3))
    x = torch.randn(5, 1, 6, 6)
    calibrate(model, x, "mse")
    model.double().eval().requires_grad_(False)
    x = 2 * x.double()  # so that some are clipped
    first, second = model[0].input_quantizer, model[2].input_quantizer
    before = model[1](model[0](x))
    residue = second(before) - before
    clipped = second.clipped(before)
    assert 0 < int(clipped.sum()) < clipped.numel()
    d1, d2 = 0.3 * torch.randn(5, 1, 6, 6).double(), 0.3 * torch.randn(before.shape).double()
    moved = F.relu(F.conv2d(first(x) + d1, model[0].weight, model[0].bias))
    held = torch.where(clipped, second(before), moved + residue) + d2
    expected = F.conv2d(held, model[2].weight, model[2].bias).flatten(1)
    sites = _sites(model)
    clean = _Clean(model, sites, x)
    with clean.held(), _added(sites, {"0": d1, "2": d2}):
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x), expected)
    torch.testing.assert_close(model(x), clean.outputs, rtol=0, atol=0)  # no hook is left


def test_a_weak_noise_is_predicted_and_its_even_part_known_well():
    """Far from the kinks all of the straight-through network's increase is the second-order term."""
    model, x, y = network(n=12)
    found = table_of(noise_response, model, (x, y), sizes=[1e-3])
    for kind in ("linear", "surrogate"):
        assert cell(found, f"ratio_{kind}_0.001") == pytest.approx(1, abs=1e-4)
        assert cell(found, f"ratio_{kind}_0.001", column="sem") < 1e-4


def test_numbers_do_not_depend_on_the_micro_batches_and_are_repeated_by_the_seed():
    model, x, y = network(n=7)
    frames = [
        table_of(noise_response, model, (x, y), sizes=[0.5], seed=seed, micro_batch=size)
        for seed, size in ((0, None), (0, 2), (1, None))
    ]
    pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-9, atol=1e-12)
    assert cell(frames[0], "real_1") != cell(frames[2], "real_1")


def test_a_sum_over_layers_is_set_against_all_at_once():
    """Without control variates, as this loss has none, it is the plain difference."""
    model, x, y = network(n=24)
    found = table_of(noise_response, model, (x, y), loss=lambda z, y: F.cross_entropy(z, y), sizes=[1.0], n_draws=2)
    for kind in ("surrogate", "real"):
        alone = sum(cell(found, f"{kind}_1", layer) for layer in LAYERS)
        assert cell(found, f"interaction_{kind}") == pytest.approx(cell(found, f"{kind}_1") - alone)


class Multiplied(nn.Module):
    """The square of the product of two convolutions that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        for conv in (self.left, self.right):
            nn.init.ones_(conv.weight)

    def forward(self, x):
        return (self.left(x) * self.right(x)).square().flatten(1)


def test_what_noise_in_two_layers_does_beyond_the_sum():
    """E (x + d)^2 (x + e)^2 = (x^2 + v)(x^2 + w): v x^2 + w x^2 by noise in one each, and v w more by both at once."""
    model = quantize(Multiplied(), QuantSpec(32, 2, edge_bits=2))
    x, y = torch.randn(1500, 1, 8, 8), torch.zeros(1500)
    calibrate(model, x, "minmax")
    found = table_of(
        noise_response, model.double().eval(), (x.double(), y), loss=lambda z, _: z.mean(), sizes=[1.0], n_draws=2
    )
    v, w = (float(q.step_size.detach()) ** 2 / 12 for q in (model.left.input_quantizer, model.right.input_quantizer))
    squares = float(model.left.input_quantizer(x.double()).detach().square().mean())
    for kind in ("surrogate", "real"):
        for layer, variance in (("left", v), ("right", w)):
            sem = cell(found, f"{kind}_1", layer, "sem")
            assert abs(cell(found, f"{kind}_1", layer) - variance * squares) < 4 * sem
        beyond, sem = (cell(found, f"interaction_{kind}", column=column) for column in ("value", "sem"))
        assert abs(beyond - v * w) < 4 * sem < v * w


# Errors ---------------------------------------------------------------------------------------------------------------


def test_control_variate_keeps_the_mean_and_the_interval_honest():
    """Heavy-tailed samples, as losses are: the controlled mean is unbiased and its error covers."""
    dice = np.random.default_rng(0)
    sizes = np.exp(1.5 * dice.normal(size=200))  # of the samples' second-order terms, the same in all repetitions
    repetitions = 600
    z, errors, plain_errors = [], [], []
    for _ in range(repetitions):
        squares = dice.normal(size=(2, 200)) ** 2
        control = torch.from_numpy(sizes * (squares - 1))
        y = torch.from_numpy(sizes * (0.8 * squares + 0.3 * dice.normal(size=(2, 200))))
        row = _mean(controlled(y, control))
        z.append((row["value"] - 0.8 * sizes.mean()) / row["sem"])
        errors.append(row["sem"])
        plain_errors.append(_mean(y)["sem"])
    z = np.array(z)
    assert abs(z.mean()) < 4 / math.sqrt(repetitions)
    assert 0.92 < (abs(z) < 1.96).mean() < 0.975
    assert np.mean(errors) < 0.5 * np.mean(plain_errors)


def test_a_ratio_and_its_error():
    dice = np.random.default_rng(1)
    z = []
    for _ in range(1000):
        predicted = np.exp(dice.normal(size=100))
        y = 1.3 * predicted + 0.2 * predicted * dice.normal(size=(2, 100))
        row = _mean(_relative(torch.from_numpy(y), torch.from_numpy(predicted)[None]))
        z.append((row["value"] - 1.3) / row["sem_data"])
    assert 0.92 < (np.abs(z) < 1.96).mean() < 0.97


def test_stated_intervals_cover_from_end_to_end():
    model, x, y = network(n=48)
    truth = table_of(noise_response, model, (x, y), sizes=[1.0], n_draws=100, seed=1000)
    quantities = ("surrogate_1", "real_1", "odd_1")
    z = {quantity: [] for quantity in quantities}
    for seed in range(25):
        found = table_of(noise_response, model, (x, y), sizes=[1.0], n_draws=4, seed=seed)
        for quantity in quantities:
            expected = 0.0 if quantity == "odd_1" else cell(truth, quantity)
            z[quantity].append((cell(found, quantity) - expected) / cell(found, quantity, column="sem"))
    for quantity, values in z.items():
        assert (np.abs(values) < 1.96).mean() > 0.8, quantity  # of 25: 95 % less three standard deviations
        assert 0.6 < np.std(values) < 1.5, quantity


def test_verdicts():
    torch.manual_seed(0)
    predicted = 1 + 0.1 * torch.rand(1, 500).double()
    noise = 0.02 * torch.randn(3, 2, 500).double()
    # Right, 5 % off (far beyond the error), 50 % off.
    joint = [
        size**2 * (off * predicted + noise[i])
        for i, (size, off) in enumerate(zip((1, 2, 4), (1, 1.05, 1.5), strict=True))
    ]
    found = {row["quantity"]: row["value"] for row in _verdicts("real", joint, predicted, [1.0, 2.0, 4.0])}
    assert found == {"holds_real": 1.0, "within_10_real": 2.0}
    found = {row["quantity"]: row["value"] for row in _verdicts("real", joint[::-1], predicted, [1.0, 2.0, 4.0])}
    assert found == {"holds_real": 0.0, "within_10_real": 0.0}


# Refusals -------------------------------------------------------------------------------------------------------------


def test_refusals():
    x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    with pytest.raises(UserError, match="No convolution of the model has a quantized input"):
        table_of(noise_response, tiny().eval(), (x, y))
    with pytest.raises(UserError, match="No convolution"):
        table_of(noise_response, quantize(tiny(), QuantSpec.parse("W4A32")).eval(), (x, y))
    for wrong in ([0.0], [-1.0], [math.inf], [math.nan]):
        with pytest.raises(UserError, match="numbers above zero"):
            table_of(noise_response, tiny(), (x, y), sizes=wrong)
    with pytest.raises(UserError, match="at least 2 draws"):
        table_of(noise_response, tiny(), (x, y), n_draws=1)


class Twice(nn.Module):
    """One convolution at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.conv(self.conv(x)).flatten(1))


def test_a_layer_that_runs_twice_is_named():
    x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    model = quantize(Twice(), QuantSpec.parse("W4A4"))
    calibrate(model, x, "mse")
    with pytest.raises(UserError, match="'conv' runs more than once"):
        table_of(noise_response, model.eval(), (x, y))


# The figure and the command -------------------------------------------------------------------------------------------


def responses(run, epoch=2, **other):
    """Rows as the probe writes them; the real network's first point is below zero."""
    rows = []
    for size in NoiseResponse.sizes:
        predicted = 0.01 * size**2
        values = {"predicted": predicted, "linear": 1.1 * predicted, "surrogate": 1.2 * predicted, "real": 0.01}
        if size == NoiseResponse.sizes[0]:
            values["real"] = -0.001
        for kind, value in values.items():
            how = "exact" if kind == "predicted" else "antithetic pairs"
            more = {"estimator": how, "probe": "noise", "ci95": 0.002, **other}
            rows.append(row(run, run, epoch=epoch, quantity=f"{kind}_{size:g}", value=value, **more))
    return rows


def test_figure_shows_prediction_and_measurements():
    frame = pd.DataFrame(responses("lsq", 1) + responses("lsq") + responses("fpq"))
    figure = noise_figure(frame)
    assert [axes.get_title() for axes in figure.axes] == ["LSQ W4A4", "FPQ W4A4"]
    for axes in figure.axes:
        assert axes.get_xscale() == axes.get_yscale() == "log"
        lines = {line.get_label(): line for line in axes.lines}
        np.testing.assert_allclose(
            lines["predicted (Eq. 7)"].get_ydata(), [0.01 * size**2 for size in NoiseResponse.sizes]
        )
        np.testing.assert_allclose(
            lines["linearised logits"].get_ydata(), [0.011 * size**2 for size in NoiseResponse.sizes]
        )
        points = {bars.get_label(): bars for bars in axes.containers}
        np.testing.assert_allclose(
            points["straight-through"][0].get_ydata().astype(float), [0.012 * size**2 for size in NoiseResponse.sizes]
        )
        np.testing.assert_allclose(points["real network"][0].get_ydata().astype(float), [0.01] * 5)
        (below,) = [line for line in axes.lines if line.get_marker() == "v"]
        np.testing.assert_allclose(below.get_ydata(), [0.001])  # the upper end of -0.001 ± 0.002
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1/8", "1/4", "1/2", "1", "2", "4"]
    assert len(figure.legends[0].get_texts()) == 4
    caption = noise_caption(frame)
    for fact in ("exact", "4 training images", "epoch 2", "95 % interval over the samples"):
        assert fact in caption
    with pytest.raises(NothingToDraw, match="no loss increase"):
        noise_figure(frame[frame["quantity"] == "none"])


def test_fractions():
    assert [fraction(x) for x in (0.125, 1 / 3, 0.3, 1.0, 4.0)] == ["1/8", "1/3", "0.3", "1", "4"]


def test_command(tiny_runs, tmp_path):
    runs = shutil.copytree(tiny_runs, tmp_path / "runs")
    call = [
        "noise",
        "--ckpt-dir",
        str(runs),
        "--n-data",
        "24",
        "--sizes",
        "0.5,1",
        "--n-draws",
        "2",
        "--model",
        "tests.nets:tiny",
    ]
    call += ["--device", "cpu", "--figures", str(tmp_path / "figures")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.stderr
    assert words(result.stdout).count("Costliest layer:") == 2  # the float run has no quantizer
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"noise.png", "noise.pdf", "noise.txt"}
    rows = [json.loads(line) for line in CliRunner().invoke(app, [*call, "--json"]).stdout.splitlines()]
    assert {row["epoch"] for row in rows} == {2}
    assert {"predicted_0.5", "real_1", "holds_real"} <= {row["quantity"] for row in rows}
    assert "to do" in CliRunner().invoke(app, [*call, "--epochs", "1", "--dry-run"]).stdout
    wrong = CliRunner().invoke(app, ["noise", "--ckpt-dir", str(runs), "--sizes", "big"])
    assert wrong.exit_code == 1
    assert "'big' are no sizes" in wrong.stderr
