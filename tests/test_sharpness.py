"""Sharpness against closed forms and direct evaluation; what survives rescaling; errors; flips on the grid."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fpq_analysis import QuantSpec, UserError, calibrate, hessian_trace, quantize
from fpq_analysis.probes import Point
from fpq_analysis.probes.grid_codes import Grid, likely_worst_flips, random_flips
from fpq_analysis.probes.sharpness import (
    CANDIDATES,
    Sharpness,
    _average_case,
    _Losses,
    _weight_quantizers,
    sharpness,
)
from fpq_analysis.probes.subject import prepare
from fpq_analysis.quantizers import quantizers, view
from fpq_analysis.records import COLUMNS
from tests.nets import FunctionalGelu, dense_hessian, tiny
from tests.results import table_of

STEPS = {"half_step_mean", "half_step_worst", "bit_flip_mean", "bit_flip_worst"}
MOVES = {"sam_one_step", "sam_adaptive", "average_case", "scaled_trace"}


def whole(frame) -> dict[str, float]:
    return frame[frame.layer == "all"].set_index("quantity").value.to_dict()


def of(frame, quantity: str, layer: str = "all"):
    return frame[(frame.layer == layer) & (frame.quantity == quantity)].iloc[0]


def data(n: int = 20, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(classes, (n,))


def mlp(bias: bool = True, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.ReLU(), nn.Linear(5, classes, bias=bias)).double()


def quantized_conv() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Biased: sums of weights on a grid are often exactly zero, where rounding decides the derivative of ReLU."""
    net = tiny().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    model = quantize(net, QuantSpec.parse("W4A4"))
    x, y = torch.randn(12, 1, 8, 8), torch.randint(10, (12,))
    calibrate(model, x, "mse")
    return model, (x, y)


def square(z, y):
    return (z[:, 0] - y).square().mean() / 2


class TestQuadraticLoss:
    """One linear unit and half the squared error: L(w + d) - L(w) = g d + d H d / 2, H = X^T X / N."""

    @pytest.fixture
    def net(self):
        x = torch.randn(50, 7, dtype=torch.float64)
        y = x.sum(1) + 0.5 * torch.randn(50, dtype=torch.float64)
        model = nn.Linear(7, 1, bias=False).double()
        h = x.T @ x / len(x)
        return model, (x, y), h

    @staticmethod
    def change(model, batch, h, d):
        w = view(model, "dequantized").weight.detach().flatten()
        g = h @ w - batch[0].T @ batch[1] / len(batch[1])
        d = d(w, g)
        return float(g @ d + d @ h @ d / 2)

    def test_steps_along_the_gradient(self, net):
        found = whole(table_of(sharpness, net[0], net[1], loss=square, rho=0.3, rho_adaptive=0.7))
        assert found["sam_one_step"] == pytest.approx(self.change(*net, lambda w, g: 0.3 * g / g.norm()))
        adaptive = self.change(*net, lambda w, g: 0.7 * w * w * g / (w * g).norm())
        assert found["sam_adaptive"] == pytest.approx(adaptive)

    def test_means_over_moves(self, net):
        model, batch, h = net
        frame = table_of(sharpness, model, batch, loss=square, sigma=0.2, n_draws=200)
        scaled = float(model.weight.detach().square().sum() * h.trace())
        for quantity, truth in {"scaled_trace": scaled, "average_case": 0.2**2 / 2 * scaled / 7}.items():
            row = of(frame, quantity)
            assert row["sem"] < 0.2 * truth
            assert abs(row.value - truth) < 4 * row["sem"] + 1e-12 * truth

    def test_half_steps(self, net):
        model = quantize(net[0], QuantSpec.parse("W4A32", edge_bits=4))
        step = _weight_quantizers(model)["weight"].step_size.detach().double()[0, 0]
        frame = table_of(sharpness, model.double(), net[1], loss=square, n_draws=100, n_flips=2)
        row, truth = of(frame, "half_step_mean"), float(step**2 / 12 * net[2].trace() / 2)
        assert abs(row.value - truth) < 4 * row["sem"] < truth
        worst = self.change(model, *net[1:], lambda w, g: step / 2 * g.sign())
        assert of(frame, "half_step_worst").value == pytest.approx(worst)
        assert of(frame, "half_step_worst", "(model)").value == pytest.approx(worst)

    def test_at_a_minimum_without_gradient_nothing_moves(self):
        x = torch.randn(9, 2, dtype=torch.float64)
        model = nn.Linear(2, 1, bias=False).double()
        found = whole(table_of(sharpness, model, (x, model(x)[:, 0].detach()), loss=square))
        assert found["sam_one_step"] == found["sam_adaptive"] == 0
        assert found["average_case"] > 0


def test_scaled_trace_equals_the_dense_hessian_block_by_block():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4, bias=False))
    model = model.double().eval()
    batch = (torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.randint(4, (6,)))
    frame = table_of(sharpness, model, batch)
    layers = {"0": [], "1": [], "4": []}
    for name, p in model.named_parameters():
        hessian = dense_hessian(model, [p], *batch)
        layers[name.split(".")[0]].append(float(p.detach().square().sum() * hessian.trace()))
    for layer, parts in layers.items():
        assert of(frame, "scaled_trace", layer).value == pytest.approx(sum(parts), rel=1e-10)
    total = of(frame, "scaled_trace")
    assert (total.estimator, total["sem"]) == ("exact", 0)
    assert total.value == pytest.approx(sum(map(sum, layers.values())), rel=1e-10)


@pytest.mark.parametrize("make", [lambda: mlp(classes=25), FunctionalGelu], ids=["drawn labels", "products"])
def test_scaled_trace_elsewhere_is_within_its_error(make):
    model, batch = make().double(), data()
    row = of(table_of(sharpness, model, batch), "scaled_trace")
    truth = sum(
        float(p.detach().square().sum() * dense_hessian(model, [p], *batch).trace()) for p in model.parameters()
    )
    assert row.estimator == ("deflated" if isinstance(model, FunctionalGelu) else "sampled")
    assert row["sem"] < 0.3 * truth
    assert abs(row.value - truth) < 4 * row["sem"] + 1e-12 * truth
    assert math.isnan(row.sem_data) == (row.estimator == "deflated")


class TestRescaling:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("bits", [None, "W4A32"])
    def test_a_layer_up_and_the_next_one_down(self, bias, bits):
        model, batch = mlp(bias), data()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in other[0].parameters():
                p *= 4
            other[2].weight /= 4
        torch.testing.assert_close(model(batch[0]), other(batch[0]))
        if bits:
            model, other = (quantize(m, QuantSpec.parse(bits, edge_bits=4)).double() for m in (model, other))
        first, second = whole(table_of(sharpness, model, batch)), whole(table_of(sharpness, other, batch))
        assert set(first) == MOVES | (STEPS if bits else set())
        for quantity in set(first) - {"sam_one_step"}:
            assert first[quantity] == pytest.approx(second[quantity], rel=1e-9)
        assert first["sam_one_step"] != pytest.approx(second["sam_one_step"], rel=0.1)
        assert hessian_trace(model, batch).value != pytest.approx(hessian_trace(other, batch).value, rel=0.1)

    @pytest.mark.parametrize("channels", [slice(None), slice(2, 3)], ids=["all", "one"])
    def test_a_convolution_with_the_statistics_behind_it(self, channels):
        model, batch = tiny().double().eval(), (torch.randn(5, 1, 8, 8).double(), torch.randint(10, (5,)))
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[3].weight[channels] *= 8
            other[4].running_mean[channels] *= 8
            other[4].running_var[channels] = 64 * (other[4].running_var[channels] + other[4].eps) - other[4].eps
        model, other = (quantize(m, QuantSpec.parse("W4A32")).double() for m in (model, other))
        first, second = (whole(table_of(sharpness, m, batch, n_draws=2, n_flips=8)) for m in (model, other))
        one_channel = channels != slice(None)
        for quantity in set(first) - {"sam_one_step"}:
            same = first[quantity] == pytest.approx(second[quantity], rel=1e-9)
            assert same != (one_channel and quantity in ("scaled_trace", "average_case"))

    def test_a_channel_alone_where_the_scale_is_that_of_each_weight(self):
        model, batch = mlp(), data()
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight[0] *= 8
            other[0].bias[0] *= 8
            other[2].weight[:, 0] /= 8
        first, second = whole(table_of(sharpness, model, batch)), whole(table_of(sharpness, other, batch))
        assert first["sam_adaptive"] == pytest.approx(second["sam_adaptive"], rel=1e-9)
        assert first["scaled_trace"] != pytest.approx(second["scaled_trace"], rel=0.1)


def test_the_worst_of_steps_and_flips_by_direct_evaluation():
    model, (x, y) = quantized_conv()
    found = table_of(sharpness, model, (x, y))
    plain = view(model, "dequantized")
    loss = F.cross_entropy(plain(x), y)
    names = [f"{name}.weight" for name, _, is_weight in quantizers(model) if is_weight]
    weights = dict(plain.named_parameters())
    gradient = dict(zip(names, torch.autograd.grad(loss, [weights[n] for n in names]), strict=True))
    grids = {n: Grid.of(weights[n].detach(), q) for n, q in _weight_quantizers(model).items()}

    def change(values):
        net = copy.deepcopy(plain)
        with torch.no_grad():
            for name, value in values.items():
                net.get_parameter(name).copy_(value)
            return float(F.cross_entropy(net(x), y) - loss)

    moved = {n: weights[n].detach() + grids[n].step / 2 * gradient[n].sign() for n in names}
    assert of(found, "half_step_worst").value == pytest.approx(change(moved), rel=1e-3, abs=1e-6)
    for name in names:
        row = of(found, "half_step_worst", name.removesuffix(".weight"))
        assert row.value == pytest.approx(change({name: moved[name]}), rel=1e-3, abs=1e-6)
    flips = likely_worst_flips(grids, gradient, CANDIDATES)
    scores = [abs(float(gradient[n].flatten()[i] * grids[n].flip_moves(b).flatten()[i])) for n, i, b in flips]
    assert len(set(flips)) == CANDIDATES
    assert scores == sorted(scores, reverse=True)
    worst = max(change({n: grids[n].flipped(i, b)}) for n, i, b in flips)
    assert of(found, "bit_flip_worst").value == pytest.approx(worst, rel=1e-3, abs=1e-6)


def test_flips_against_all_flips():
    """2-bit codes of a small layer: every flip is a candidate, and their mean is known."""
    model = quantize(nn.Linear(3, 2, bias=False), QuantSpec.parse("W2A32", edge_bits=2)).double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(2, (30,))
    plain = view(model, "dequantized")
    grid = Grid.of(plain.weight.detach(), _weight_quantizers(model)["weight"])
    here = F.cross_entropy(plain(x), y)
    every = [F.cross_entropy(x @ grid.flipped(i, bit).T, y) - here for i in range(6) for bit in range(2)]
    every = torch.stack(every).detach()
    found = table_of(sharpness, model, (x, y), n_flips=1000)
    assert of(found, "bit_flip_worst").value == pytest.approx(float(every.max()))
    row = of(found, "bit_flip_mean")
    assert abs(row.value - float(every.mean())) < 4 * row["sem"]


def test_weights_of_flips_undo_the_sampling():
    model = quantize(tiny(), QuantSpec.parse("W2A32"))
    plain = dict(view(model, "dequantized").named_parameters())
    grids = {n: Grid.of(plain[n].detach(), q) for n, q in _weight_quantizers(model).items()}
    flips, weights = random_flips(grids, 4000, seed=0)
    total = sum(g.codes.numel() for g in grids.values())
    for name, grid in grids.items():
        for bit in (0, grid.bits - 1):
            mine = torch.tensor([flip[0] == name and flip[2] == bit for flip in flips])
            draws = weights * mine
            truth = grid.codes.numel() / total / grid.bits
            assert abs(float(draws.mean()) - truth) < 4 * float(draws.std()) / len(flips) ** 0.5
        assert all(0 <= place < grid.codes.numel() for n, place, _ in flips if n == name)


@pytest.mark.parametrize("bits", range(2, 9))
def test_flips_stay_on_the_grid(bits):
    model = quantize(nn.Conv2d(2, 3, 2), QuantSpec.parse(f"W{bits}A32", edge_bits=bits))
    quantizer = _weight_quantizers(model)["weight"]
    weight = view(model, "dequantized").weight.detach()
    grid = Grid.of(weight.contiguous(memory_format=torch.channels_last), quantizer)
    levels = (torch.arange(2**bits).view(1, 1, 1, -1) - grid.zero) * grid.step  # (rows, 1, 1, levels)
    assert torch.equal((grid.codes.float() - grid.zero) * grid.step, weight)
    for place in range(weight.numel()):
        row = place // weight[0].numel()
        for bit in range(bits):
            flipped = grid.flipped(place, bit)
            value = flipped.flatten()[place]
            assert bool((levels[row] == value).any())
            assert (flipped != weight).flatten().nonzero().flatten().tolist() == [place]
            move = float(grid.flip_moves(bit).flatten()[place])
            assert float(value - weight.flatten()[place]) == pytest.approx(move, rel=1e-4)
            back = Grid.of(flipped, quantizer)
            assert torch.equal(back.flipped(place, bit), weight)
            # In two's complement of k - 2^(bits-1) the same bit tells the two codes apart.
            codes = [int(g.codes.flatten()[place]) - 2 ** (bits - 1) for g in (grid, back)]
            assert (codes[0] ^ codes[1]) & (2**bits - 1) == 1 << bit


def test_intervals_hold_the_mean_over_all_moves():
    losses = _Losses(prepare(mlp(), data()))
    truth = _average_case(losses, Sharpness(sigma=0.5, n_draws=600), 0)["value"]
    rows = [_average_case(losses, Sharpness(sigma=0.5), seed) for seed in range(1, 41)]
    inside = sum(abs(row["value"] - truth) < 2.13 * row["sem"] for row in rows)  # Student's t for 16 draws
    assert 34 <= inside <= 40


def test_small_moves_see_the_trace():
    model, batch = mlp(), data()
    frame = table_of(sharpness, model, batch, sigma=1e-3, n_draws=400)
    parts = [
        float(p.detach().square().sum() * dense_hessian(model, [p], *batch).trace()) / p.numel()
        for p in model.parameters()
    ]
    row, truth = of(frame, "average_case"), 1e-6 / 2 * sum(parts)
    assert abs(row.value - truth) < 4 * row["sem"] < truth


def test_the_error_over_the_data_is_that_of_the_samples():
    model, (x, y) = mlp(), data(12)
    frame = table_of(sharpness, model, (x, y), n_draws=4)
    alone = [whole(table_of(sharpness, model, (x[i : i + 1], y[i : i + 1]), n_draws=4)) for i in range(len(x))]
    for quantity in ("scaled_trace", "average_case"):
        values = torch.tensor([found[quantity] for found in alone])
        row = of(frame, quantity)
        assert row.value == pytest.approx(float(values.mean()))
        assert row.sem_data == pytest.approx(math.hypot(row["sem"], float(values.std()) / 12**0.5), rel=1e-6)
    assert math.isnan(of(frame, "sam_one_step").sem_data)


class TestWhatIsMeasured:
    def test_float_models_have_no_steps(self):
        assert set(table_of(sharpness, mlp(), data()).quantity) == MOVES

    def test_the_float_definition_takes_the_quantizers_off(self):
        model, batch = quantized_conv()
        assert set(whole(table_of(sharpness, model, batch, n_draws=2, n_flips=2))) == MOVES | STEPS
        found = whole(table_of(sharpness, model, batch, definition="float", n_draws=2))
        assert set(found) == MOVES
        assert found == whole(table_of(sharpness, view(model, "float"), batch, n_draws=2))

    def test_micro_batches_layouts_and_losses_make_no_difference(self):
        model, batch = quantized_conv()
        model, batch = model.double(), (batch[0].double(), batch[1])
        few = {"n_draws": 3, "n_flips": 3}
        reference = whole(table_of(sharpness, model, batch, **few))
        for found in (
            table_of(sharpness, model, batch, micro_batch=5, **few),
            table_of(sharpness, model, [(batch[0][:5], batch[1][:5]), (batch[0][5:], batch[1][5:])], **few),
            table_of(sharpness, copy.deepcopy(model).to(memory_format=torch.channels_last), batch, **few),
        ):
            assert whole(found) == pytest.approx(reference, rel=1e-9)
        own = whole(table_of(sharpness, model, batch, loss=lambda z, y: F.cross_entropy(z, y), **few))
        del reference["scaled_trace"], own["scaled_trace"]  # by products for a loss that is not known
        assert own == pytest.approx(reference, rel=1e-9)

    def test_seeds(self):
        model, batch = quantized_conv()
        first, second, other = (table_of(sharpness, model, batch, seed=s, n_draws=3, n_flips=8) for s in (1, 1, 2))
        assert first.equals(second)
        for quantity in ("average_case", "half_step_mean", "bit_flip_mean"):
            assert of(first, quantity).value != of(other, quantity).value
        for quantity in ("scaled_trace", "sam_one_step", "half_step_worst", "bit_flip_worst"):
            assert of(first, quantity).value == of(other, quantity).value

    def test_the_model_is_left_as_it_was(self):
        model, batch = quantized_conv()
        model.train()
        state = copy.deepcopy(model.state_dict())
        rng = torch.random.get_rng_state()
        with torch.no_grad():
            table_of(sharpness, model, batch)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
        assert torch.equal(rng, torch.random.get_rng_state())
        assert model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def test_the_probe_gives_the_same_numbers_as_rows(self):
        model, batch = quantized_conv()
        rows = Sharpness(n_draws=2, n_flips=2)(Point(model, batch, seed=3))
        assert [row["value"] for row in rows] == table_of(
            sharpness, model, batch, n_draws=2, n_flips=2, seed=3
        ).value.tolist()
        assert all(set(row) <= set(COLUMNS) for row in rows)
        assert (rows[-1]["layer"], rows[-1]["quantity"]) == ("all", "scaled_trace")
        for row in rows:
            if "samples" in row:
                assert sum(row["samples"]) / 12 == pytest.approx(row["value"], rel=1e-5, abs=1e-7)
        assert sum("samples" in row for row in rows) == 4

    def test_frozen_and_unused_parameters(self):
        model, batch = mlp(), data()
        model.idle = nn.Linear(2, 2).double()
        model.forward = lambda x: model[2](model[1](model[0](x)))
        model[0].requires_grad_(False)
        found = table_of(sharpness, quantize(model, QuantSpec.parse("W4A32")).double(), batch)
        assert "0" not in set(found.layer)
        assert of(found, "scaled_trace", "idle").value == 0


class TestMisuse:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"definition": "latent"}, "changes nothing"),
            ({"definition": "dequantised"}, "did you mean"),
            ({"rho": 0}, "rho is 0"),
            ({"rho_adaptive": math.nan}, "rho_adaptive is nan"),
            ({"sigma": -1}, "sigma is -1"),
            ({"n_draws": 1}, "at least 2"),
            ({"n_flips": 1}, "at least 2"),
            ({"loss": "hinge"}, "Unknown loss"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(UserError, match=message):
            table_of(sharpness, mlp(), data(), **settings)

    def test_a_loss_that_is_not_finite(self):
        x, y = data()
        with pytest.raises(UserError, match="not finite"):
            table_of(sharpness, mlp(), (x * math.nan, y))
        with pytest.raises(UserError, match="not finite"):
            table_of(sharpness, quantize(mlp(), QuantSpec.parse("W4A4")).double(), (x, y))

    def test_nothing_to_move(self):
        with pytest.raises(UserError, match="no trainable parameter"):
            table_of(sharpness, mlp().requires_grad_(False), data())
