"""Gradient norms against autograd and analytic gradients; the arms against plain loops; errors; Figure 2."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fpq_analysis import GradNorm, QuantSpec, UserError, calibrate, gradient_norms, quantize, records
from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots import caption2, figure2
from fpq_analysis.probes import Point
from fpq_analysis.quantizers import quantizers, variables, view
from fpq_analysis.records import COLUMNS
from fpq_analysis.records.queries import norms
from tests.nets import FunctionalGelu, tiny
from tests.results import table_of
from tests.test_cli import call
from tests.test_records_and_plots import row
from tests.words import words

Batch = tuple[torch.Tensor, torch.Tensor]


def of(frame, quantity, layer="all"):
    return frame[(frame["layer"] == layer) & (frame["quantity"] == quantity)].iloc[0]


def data(n: int = 20, classes: int = 3) -> Batch:
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(classes, (n,))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def quantized(bits: str = "W4A4") -> tuple[nn.Module, Batch]:
    net = tiny().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    model = quantize(net, QuantSpec.parse(bits))
    x, y = torch.randn(11, 1, 8, 8), torch.randint(10, (11,))
    calibrate(model, x, "mse")
    return model.double().eval(), (x.double(), y)


def flat(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean cross-entropy, by autograd, without anything of ours but the names."""
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(variables(model).values()))
    return torch.cat([g.flatten() for g in gradients])


def per_sample(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([flat(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])


def test_softmax_regression():
    """g = (1/N) sum_n (p_n - e_y) x_n^T, and the same for the bias without x_n."""
    model, (x, y) = nn.Linear(6, 3).double(), data()
    residue = (model(x).softmax(1) - F.one_hot(y, 3)).detach() / len(x)
    weight, bias = residue.T @ x, residue.sum(0)
    found = of(table_of(gradient_norms, model, (x, y)), "grad_norm@clean")
    assert found["value"] == pytest.approx(math.hypot(float(weight.norm()), float(bias.norm())))
    assert found["sem"] == 0


@pytest.mark.parametrize("definition", ["dequantized", "latent", "float"])
def test_clean_norms_in_total_by_layer_and_by_minibatch(definition):
    model, (x, y) = quantized()
    frame = table_of(gradient_norms, model, (x, y), definition=definition, batch_size=4, n_draws=2, micro_batch=3)
    plain = view(model, definition)
    truth = flat(plain, x, y)
    assert of(frame, "grad_norm@clean")["value"] == pytest.approx(float(truth.norm()))
    parts = truth.split([p.numel() for p in variables(plain).values()])
    squares: dict[str, float] = {}
    for name, part in zip(variables(plain), parts, strict=True):
        layer = name.rpartition(".")[0]
        squares[layer] = squares.get(layer, 0.0) + float(part.square().sum())
    for layer, square in squares.items():
        assert of(frame, "grad_norm@clean", layer)["value"] == pytest.approx(math.sqrt(square), rel=1e-9, abs=1e-12)
    lengths = torch.stack([flat(plain, x[i : i + 4], y[i : i + 4]).norm() for i in (0, 4)])
    found = of(frame, "grad_norm_minibatch@clean")
    assert found["value"] == pytest.approx(float(lengths.mean()))
    assert found["sem_data"] == pytest.approx(float(lengths.std()) / 2**0.5)
    assert found["estimator"] == "minibatches of 4"


@pytest.mark.parametrize("make", [mlp, lambda: FunctionalGelu().double()], ids=["relu", "gelu"])
def test_the_error_over_the_data_is_that_of_the_projections(make):
    model, (x, y) = make(), data()
    single = per_sample(model, x, y)
    g = single.mean(0)
    along = single @ g / g.norm()
    found = GradNorm(batch_size=5)(Point(model, (x, y)))[-1]
    assert (found["layer"], found["quantity"]) == ("all", "grad_norm@clean")
    np.testing.assert_allclose(found["samples"], along, rtol=1e-6, atol=1e-9)
    assert np.mean(found["samples"]) == pytest.approx(found["value"], rel=1e-6)
    assert found["sem_data"] == pytest.approx(float(along.std()) / 20**0.5)
    own = table_of(gradient_norms, model, (x, y), loss=lambda z, t: F.cross_entropy(z, t))
    assert of(own, "grad_norm@clean")["sem_data"] == pytest.approx(found["sem_data"])


def test_the_bias_from_minibatches_of_one_is_that_of_the_samples_covariance():
    model, (x, y) = mlp(), data()
    single = per_sample(model, x, y)
    g = single.mean(0)
    spread = single.var(0).sum()
    truth = (spread - (single @ g / g.norm()).var()) / (2 * len(x) * g.norm())
    assert of(table_of(gradient_norms, model, (x, y), batch_size=1), "grad_norm_bias@clean")["value"] == pytest.approx(
        float(truth)
    )


@pytest.mark.simulation
def test_errors_and_bias_are_those_of_fresh_samples():
    """Of a network at rest, on samples of one distribution, whose gradient is known from very many of them."""
    model = mlp()
    with torch.no_grad():
        model[2].weight *= 3
    dice = torch.Generator().manual_seed(1)

    def fresh(n: int) -> Batch:
        x = torch.randn(n, 6, generator=dice, dtype=torch.float64)
        return x, (x[:, 0] > 0).long() + (x[:, 1] > 1)

    truth = float(flat(model, *fresh(200_000)).norm())
    rows = [table_of(gradient_norms, model, fresh(100), batch_size=25) for _ in range(200)]
    values, sems, halves = (
        np.array([of(r, "grad_norm@clean")[c] for r in rows]) for c in ("value", "sem_data", "ci95")
    )
    biases = np.array([of(r, "grad_norm_bias@clean")["value"] for r in rows])
    assert np.sqrt(np.mean(sems**2)) == pytest.approx(values.std(ddof=1), rel=0.15)
    assert biases.mean() == pytest.approx(values.mean() - truth, abs=4 * values.std() / 200**0.5)
    assert biases.mean() > 4 * biases.std() / 200**0.5
    assert 184 <= int((abs(values - biases - truth) < halves).sum()) <= 196
    # The minibatches' mean norm has no such bias: its own error alone.
    small = np.array([of(r, "grad_norm_minibatch@clean")["value"] for r in rows])
    apart = np.array([float(flat(model, *fresh(25)).norm()) for _ in range(800)])
    error = math.hypot(small.std() / 200**0.5, apart.std() / 800**0.5)
    assert small.mean() == pytest.approx(apart.mean(), abs=4 * error)


class TestNoise:
    @pytest.mark.parametrize("definition", ["dequantized", "latent"])
    def test_in_the_weights_against_a_plain_loop(self, definition):
        model, (x, y) = quantized()
        frame = table_of(gradient_norms, model, (x, y), definition=definition, n_draws=3, seed=5)
        lengths = []
        for seed in torch.randint(2**31, (3,), generator=torch.Generator().manual_seed(5)).tolist():
            dice = torch.Generator().manual_seed(seed)
            noisy = view(model, definition)
            plain = dict(noisy.named_modules())
            for name, quantizer, is_weight in quantizers(model):
                layer = plain[name]
                if not is_weight or isinstance(layer, nn.Linear):
                    continue
                move = quantizer.step_size.detach() * (torch.rand(layer.weight.shape, generator=dice).double() - 0.5)
                assert float(move.abs().max()) <= float(quantizer.step_size.detach().max()) / 2
                if definition == "dequantized":
                    layer.weight.data += move
                else:
                    own = layer.parametrizations.weight[0]
                    own.register_forward_hook(lambda module, args, out, move=move: out + move)
            lengths.append(float(flat(noisy, x, y).norm()))
        found = of(frame, "grad_norm@weights")
        assert found["value"] == pytest.approx(np.mean(lengths))
        assert found["sem"] == pytest.approx(np.std(lengths, ddof=1) / 3**0.5)
        assert np.std(lengths) > 0

    def test_in_the_features_against_a_plain_loop(self):
        model, (x, y) = quantized()
        frame = table_of(gradient_norms, model, (x, y), n_draws=12, seed=5)
        plain = view(model, "dequantized")
        lengths, first = [], None
        for seeds in torch.randint(2**31, (3, 11), generator=torch.Generator().manual_seed(5)).tolist():
            single = []
            for i, seed in enumerate(seeds):
                dice = torch.Generator().manual_seed(seed)
                handles = []
                for layer in plain.modules():
                    if isinstance(layer, nn.Conv2d):
                        step = layer.input_quantizer.step_size.detach()

                        def noisy(module, args, dice=dice, step=step):
                            uniform = torch.rand(args[0].numel(), generator=dice).view(args[0].shape).double()
                            return (args[0] + step * (uniform - 0.5),)

                        handles.append(layer.register_forward_pre_hook(noisy))
                single.append(flat(plain, x[i : i + 1], y[i : i + 1]))
                for handle in handles:
                    handle.remove()
            g = torch.stack(single).mean(0)
            lengths.append(float(g.norm()))
            if first is None:
                first = torch.stack(single) @ g / g.norm()
        found = of(frame, "grad_norm@features")
        assert found["value"] == pytest.approx(np.mean(lengths))
        sem = np.std(lengths, ddof=1) / 3**0.5
        assert found["sem"] == pytest.approx(sem)
        assert found["sem_data"] == pytest.approx(math.hypot(sem, float(first.std()) / 11**0.5))

    def test_only_where_something_is_quantized(self):
        arms = {
            bits: {q.partition("@")[2] for q in table_of(gradient_norms, *quantized(bits), n_draws=2)["quantity"]}
            for bits in ("W4A4", "W4A32", "W32A4")
        }
        assert arms == {
            "W4A4": {"clean", "features", "weights"},
            "W4A32": {"clean", "weights"},
            "W32A4": {"clean", "features"},
        }
        for frame in (
            table_of(gradient_norms, mlp(), data()),
            table_of(gradient_norms, *quantized(), definition="float"),
        ):
            assert all(quantity.endswith("@clean") for quantity in frame["quantity"])


class TestWhatIsMeasured:
    def test_micro_batches_and_layouts_make_no_difference(self):
        model, (x, y) = quantized()
        whole = table_of(gradient_norms, model, (x, y), n_draws=2, batch_size=4)
        for other in (
            table_of(gradient_norms, model, (x, y), n_draws=2, batch_size=4, micro_batch=3),
            table_of(gradient_norms, model, [(x[:5], y[:5]), (x[5:], y[5:])], n_draws=2, batch_size=4),
            table_of(
                gradient_norms,
                copy.deepcopy(model).to(memory_format=torch.channels_last),
                (x, y),
                n_draws=2,
                batch_size=4,
            ),
        ):
            pd.testing.assert_frame_equal(whole, other, rtol=1e-7, atol=1e-10)

    def test_seeds_are_of_the_noise(self):
        model, batch = quantized()
        first, second = (table_of(gradient_norms, model, batch, n_draws=2, seed=s) for s in (0, 1))
        for arm in ("clean", "features", "weights"):
            same = of(first, f"grad_norm@{arm}")["value"] == of(second, f"grad_norm@{arm}")["value"]
            assert same == (arm == "clean")

    def test_the_model_is_left_as_it_was(self):
        model, batch = quantized()
        expected = table_of(gradient_norms, model, batch, n_draws=2)
        model.train()
        state, rng = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
        with torch.no_grad():
            assert table_of(gradient_norms, model, batch, n_draws=2).equals(expected)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
        assert torch.equal(rng, torch.random.get_rng_state())
        assert model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def test_frozen_and_unused_parameters(self):
        model, batch = mlp(), data()
        model.idle = nn.Linear(2, 2).double()
        model.forward = lambda x: model[2](model[1](model[0](x)))
        model[0].requires_grad_(False)
        frame = table_of(gradient_norms, model, batch)
        assert "0" not in set(frame["layer"])
        assert of(frame, "grad_norm@clean", "idle")["value"] == 0

    def test_a_gradient_of_zero(self):
        model = nn.Linear(6, 3).double()
        found = of(table_of(gradient_norms, model, data(), loss=lambda z, y: 0 * z.sum()), "grad_norm@clean")
        assert (found["value"], found["sem_data"], found["ci95"]) == (0, 0, 0)

    def test_too_few_data_for_a_minibatch(self):
        frame = table_of(gradient_norms, mlp(), data(7), batch_size=8)
        assert not frame["quantity"].str.contains("minibatch|bias").any()
        one = of(table_of(gradient_norms, mlp(), data(7), batch_size=7), "grad_norm_minibatch@clean")
        assert math.isnan(one["sem_data"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"n_draws": 1}, "at least 2"), ({"batch_size": 0}, "at least one"), ({"definition": "dequantised"}, "did you")],
)
def test_misuse(settings, message):
    with pytest.raises(UserError, match=message):
        table_of(gradient_norms, mlp(), data(), **settings)


def test_not_finite():
    x, y = data()
    with pytest.raises(UserError, match="not finite"):
        table_of(gradient_norms, mlp(), (x * math.nan, y))


class TestFigure2:
    @staticmethod
    def rows(run, method, scale, **other):
        return [
            row(run, method, epoch=epoch, value=scale * (epoch + k), quantity=f"{quantity}@{arm}", ci95=0.5, **{
                "n_products": 8, "estimator": how, "probe": "gradnorm", **other})
            for epoch in (2, 0, 1)
            for k, arm in enumerate(("clean", "features", "weights"), 1)
            for quantity, how in (("grad_norm_minibatch", "minibatches of 256"), ("grad_norm", "all data"))
        ]  # fmt: skip

    @staticmethod
    def lines(axes):
        return {line.get_label(): line.get_ydata().tolist() for line in axes.lines if line.get_label() != "_"}

    def test_runs_trained_in_noise_are_drawn_in_that_noise(self):
        frame = pd.DataFrame(
            [
                *self.rows("lsq", "lsq", 1.0),
                *self.rows("f", "noise-features", 2.0),
                *self.rows("w", "noise-weights", 3.0),
            ]
        )
        (axes,) = figure2(frame).axes
        assert self.lines(axes) == {"noise in the features": [4, 6, 8], "noise in the weights": [9, 12, 15]}
        assert axes.get_title() == "ResNet-20, digits, W4A4"
        assert axes.get_ylabel() == "Gradient norm"
        band = axes.collections[0].get_paths()[0].vertices
        assert {3.5, 4.5} == {y for x, y in band if x == 0}
        assert len({line.get_marker() for line in axes.lines if line.get_label() != "_"}) == 2
        assert "trained with" in caption2(frame)

    def test_otherwise_the_arms_of_the_lsq_runs(self):
        frame = pd.DataFrame([*self.rows("lsq", "lsq", 1.0), *self.rows("fpq", "fpq", 2.0)])
        (axes,) = figure2(frame).axes
        assert self.lines(axes) == {
            "no noise": [1, 2, 3],
            "noise in the features": [2, 3, 4],
            "noise in the weights": [3, 4, 5],
        }
        assert axes.get_title() == "LSQ W4A4"
        for fact in ("dequantized", "8 draws", "4 training images", "95 %", "trained without noise"):
            assert fact in caption2(frame)
        (axes,) = figure2(frame.assign(value=2 * frame["value"]), quantity="grad_norm").axes
        assert self.lines(axes)["no noise"] == [2, 4, 6]

    def test_without_lsq_every_run_and_scales(self):
        frame = pd.DataFrame([*self.rows("a/fpq", "fpq", 2.0), *self.rows("b/fpq", "fpq", 1.0, bits="W2A4")])
        frame.loc[(frame["run"] == "a/fpq") & (frame["epoch"] == 2), "value"] *= 100
        one, two = figure2(frame).axes
        assert (one.get_title(), two.get_title()) == ("FPQ W4A4", "FPQ W2A4")
        assert (one.get_yscale(), two.get_yscale()) == ("log", "log")  # one kind of axis in a figure
        assert figure2(frame[frame["epoch"] != 2]).axes[0].get_yscale() == "linear"

    def test_nothing(self):
        empty = pd.DataFrame(columns=list(COLUMNS)).astype({"quantity": str})
        clean = pd.DataFrame(self.rows("fp", "fp", 1.0))
        for frame in (empty, clean[clean["quantity"].str.endswith("@clean")]):
            with pytest.raises(NothingToDraw, match="no finite grad_norm_minibatch"):
                figure2(frame)

    def test_from_the_command_line(self, tiny_runs, tmp_path):
        runs = shutil.copytree(tiny_runs, tmp_path / "runs")
        where = ["--ckpt-dir", runs, "--model", "tests.nets:tiny", "--device", "cpu", "--figures", tmp_path]
        few = ["gradnorm", *where, "--n-data", 16, "--n-draws", 2]
        result = call(*few, "--batch-size", 8)
        assert all(len(line) <= 80 for line in result.stdout.splitlines())
        assert "minibatches of 8" in words(result.stdout)
        assert "9 done, 0 to do" in words(call(*few, "--batch-size", 8).stderr)
        frame = records.load(runs, "gradnorm")
        assert set(frame[frame["method"] == "fp"]["quantity"].str.partition("@")[2]) == {"clean"}
        (axes,) = figure2(frame).axes
        assert (tmp_path / "figure2.txt").read_text() == caption2(frame) + "\n"
        rows = norms(frame[frame["method"] == "lsq"])
        looks = {"features": "noise in the features", "weights": "noise in the weights", "clean": "no noise"}
        for arm, text in looks.items():
            assert self.lines(axes)[text] == rows[rows["arm"] == arm].sort_values("epoch")["value"].tolist()
        (tmp_path / "figure2.png").unlink()
        assert "do not fill a minibatch" in " ".join(call(*few).stdout.split())
        assert not (tmp_path / "figure2.png").exists()
