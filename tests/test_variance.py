"""Variance of the output against closed forms; its errors; what the noise depends on; Figure 1."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fpq_analysis import OutputVariance, QuantSpec, UserError, calibrate, output_variance, quantize, records
from fpq_analysis.errors import NothingToDraw
from fpq_analysis.intervals import over_seeds
from fpq_analysis.plots import caption1, figure1
from fpq_analysis.probes import Point
from fpq_analysis.probes.variance import variance_with_error
from fpq_analysis.records import COLUMNS
from tests.nets import tiny
from tests.results import table_of
from tests.test_cli import call
from tests.test_records_and_plots import row
from tests.words import words


def of(frame, quantity):
    return frame[frame["quantity"] == quantity].iloc[0]


def linear(classes: int = 3) -> nn.Linear:
    return nn.Linear(5, classes).double()


@pytest.mark.simulation
def images(n: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, *(shape or (5,)), dtype=torch.float64), torch.randint(3, (n,))


class TestALinearNetwork:
    """Its logits are normal with variance sd^2 |W_c|^2, whatever the image."""

    def test_intervals_hold_the_truth(self):
        model, batch = linear(), images(40)
        truth = 0.3**2 * float(model.weight.detach().square().sum(1).mean())
        rows = [
            of(table_of(output_variance, model, batch, sds=[0.3], seed=s), "logit_variance@0.3") for s in range(200)
        ]
        for halves in ([2.023 * r["sem_data"] for r in rows], [1.96 * r["sem"] for r in rows]):
            inside = sum(abs(r["value"] - truth) < half for r, half in zip(rows, halves, strict=True))
            assert 184 <= inside <= 196
        values = [r["value"] for r in rows]
        assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / math.sqrt(200))
        assert rows[0]["ci95"] == pytest.approx(2.0227 * rows[0]["sem_data"], rel=1e-4)

    def test_the_sweep_is_quadratic_as_the_sds_share_their_noise(self):
        frame = table_of(output_variance, linear(), images(4), sds=[0.1, 0.2, 1.0])
        first = of(frame, "logit_variance@0.1")
        for sd in (0.2, 1.0):
            for column in ("value", "sem", "sem_data"):
                assert of(frame, f"logit_variance@{sd:g}")[column] == pytest.approx((sd / 0.1) ** 2 * first[column])

    def test_probabilities_of_two_classes_to_first_order(self):
        """p_1 = sigmoid(z_1 - z_0), so its variance tends to sd^2 (p_0 p_1)^2 |W_1 - W_0|^2, and so does p_0's."""
        model, batch = linear(2), images(60)
        p = model(batch[0]).softmax(1).detach()
        gap = (model.weight[1] - model.weight[0]).detach().square().sum()
        truth = float(1e-6 * ((p[:, 0] * p[:, 1]) ** 2 * gap).mean())
        found = of(table_of(output_variance, model, batch, sds=[1e-3], n_draws=200), "probability_variance@0.001")
        assert found["sem"] < 0.03 * truth
        assert abs(found["value"] - truth) < 4 * found["sem"]

    def test_flips(self):
        """Of two classes with margin m = z_1 - z_0: Phi(-|m| / (sd |W_1 - W_0|))."""
        model, batch = linear(2), images(60)
        z = model(batch[0]).detach()
        scale = 0.5 * float((model.weight[1] - model.weight[0]).detach().norm())
        truth = float(torch.special.ndtr(-(z[:, 1] - z[:, 0]).abs() / scale).mean())
        found = of(table_of(output_variance, model, batch, sds=[0.5], n_draws=100), "flipped@0.5")
        assert abs(found["value"] - truth) < 4 * found["sem"] < 0.1


class TestErrors:
    def test_from_the_draws_whatever_the_covariance(self):
        dice = torch.Generator().manual_seed(0)
        mix = torch.randn(3, 3, generator=dice, dtype=torch.float64)
        z = torch.randn(6, 20_000, 3, generator=dice, dtype=torch.float64) @ mix
        values, variance = variance_with_error(z)
        covariance = mix.T @ mix
        assert float(values.mean()) == pytest.approx(float(covariance.trace()) / 3, rel=0.02)
        truth = 2 * float(covariance.square().sum()) / 9 / 5
        assert float(values.var()) == pytest.approx(truth, rel=0.05)
        assert float(variance.mean()) == pytest.approx(truth, rel=0.05)

    def test_over_the_images_is_the_spread_of_fresh_samples(self):
        net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        frames = [table_of(output_variance, net, images(50), sds=[0.2], seed=s) for s in range(100)]
        for quantity in ("logit_variance@0.2", "probability_variance@0.2", "flipped@0.2"):
            rows = [of(frame, quantity) for frame in frames]
            spread = np.std([row["value"] for row in rows], ddof=1)
            assert np.sqrt(np.mean([row["sem_data"] ** 2 for row in rows])) == pytest.approx(spread, rel=0.25)


def quantized() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    model = quantize(tiny(), QuantSpec.parse("W4A4"))
    batch = torch.randn(11, 1, 8, 8), torch.randint(10, (11,))
    calibrate(model, batch[0], "mse")
    return model.eval(), batch


def test_against_a_plain_loop():
    model, (x, y) = quantized()
    model, x = model.double(), x.double()
    frame = table_of(output_variance, model, (x, y), sds=[0.2, 0.4], n_draws=5, seed=7)
    seeds = torch.randint(2**31, (11,), generator=torch.Generator().manual_seed(7))
    for sd in (0.2, 0.4):
        logits, probabilities, flips = [], [], []
        for image, seed in zip(x, seeds.tolist(), strict=True):
            noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
            z = model(image + sd * noise).detach()
            logits.append(z.var(0).mean())
            probabilities.append(z.softmax(1).var(0).mean())
            flips.append((z.argmax(1) != model(image[None]).argmax()).float().mean())
        for quantity, parts in {"logit": logits, "probability": probabilities}.items():
            assert of(frame, f"{quantity}_variance@{sd}")["value"] == pytest.approx(float(torch.stack(parts).mean()))
        assert of(frame, f"flipped@{sd}")["value"] == pytest.approx(float(torch.stack(flips).mean()))


def test_micro_batches_layouts_and_the_others_sds_make_no_difference():
    model, (x, y) = quantized()
    model, x = model.double(), x.double()
    whole = table_of(output_variance, model, (x, y))
    for other in (
        table_of(output_variance, model, (x, y), micro_batch=3),
        table_of(output_variance, model, [(x[:4], y[:4]), (x[4:], y[4:])]),
        table_of(output_variance, copy.deepcopy(model).to(memory_format=torch.channels_last), (x, y)),
    ):
        pd.testing.assert_frame_equal(whole, other, rtol=1e-9)
    assert of(table_of(output_variance, model, (x, y), sds=[0.2]), "flipped@0.2").equals(of(whole, "flipped@0.2"))
    assert not table_of(output_variance, model, (x, y), seed=1)["value"].equals(whole["value"])


def test_the_model_is_left_as_it_was_and_measured_in_eval_mode():
    model, batch = quantized()
    expected = table_of(output_variance, model, batch)
    model.train()
    state, rng = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert table_of(output_variance, model, batch).equals(expected)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert torch.equal(rng, torch.random.get_rng_state())
    assert model.training


def test_the_probe_gives_the_same_numbers_with_each_image_s_own():
    model, batch = quantized()
    rows = OutputVariance(n_draws=4)(Point(model, batch, seed=3))
    assert [row["value"] for row in rows] == table_of(output_variance, model, batch, n_draws=4, seed=3)[
        "value"
    ].tolist()
    assert rows[-1]["quantity"] == "logit_variance@0.5"
    for found in rows:
        assert len(found["samples"]) == 11
        assert np.mean(found["samples"]) == pytest.approx(found["value"], rel=1e-6, abs=1e-12)


class TestMisuse:
    @pytest.mark.parametrize("settings", [{"sds": []}, {"sds": [0.1, 0.0]}, {"sds": [math.nan]}, {"n_draws": 2}])
    def test_settings(self, settings):
        with pytest.raises(UserError, match="above zero|at least 3"):
            table_of(output_variance, linear(), images(3), **settings)

    def test_no_logits(self):
        with pytest.raises(UserError, match="one row of logits"):
            table_of(output_variance, nn.Conv2d(1, 2, 3).double(), images(3, 1, 4, 4))

    def test_not_finite(self):
        x, y = images(3)
        with pytest.raises(UserError, match="not finite"):
            table_of(output_variance, linear(), (x * math.nan, y))


class TestFigure1:
    @staticmethod
    def rows(run, method, bits, value, *, epoch=5, sds=(0.05, 0.1, 0.2), **other):
        common = {"definition": None, "probe": "output_variance", "estimator": "gaussian noise", **other}
        return [
            row(
                run,
                method,
                bits,
                epoch,
                value * sd**2,
                quantity=f"{quantity}@{sd:g}",
                ci95=0.1 * value * sd**2,
                **common,
            )
            for sd in sds
            for quantity in ("flipped", "probability_variance", "logit_variance")
        ]

    @pytest.fixture
    def frame(self):
        found = []
        for value, method in enumerate(("fpq", "lsq", "pact", "fp"), 1):
            for bits in ("FP",) if method == "fp" else ("W2A4", "W4A4"):
                scale = value * (2 if bits == "W2A4" else 1)
                found += self.rows(f"{method}-{bits}", method, bits, 99.0, epoch=0)
                found += self.rows(f"{method}-{bits}", method, bits, scale)
        return pd.DataFrame(found)

    def test_bars_in_the_catalogue_s_order_are_the_last_epoch_s_records(self, frame):
        bars, sweep = figure1(frame).axes
        assert [text.get_text() for text in bars.get_xticklabels()] == ["FP", "LSQ", "PACT", "FPQ"]
        labels = ["FP", "LSQ W4A4", "LSQ W2A4", "PACT W4A4", "PACT W2A4", "FPQ W4A4", "FPQ W2A4"]
        scales = [4, 2, 4, 3, 6, 1, 2]
        np.testing.assert_allclose([bar.get_height() for bar in bars.patches], 0.01 * np.array(scales))
        ends = [bars.collections[i].get_segments()[0][:, 1] for i in range(7)]
        np.testing.assert_allclose([high - low for low, high in ends], 2 * 0.1 * 0.01 * np.array(scales))
        assert bars.patches[1].get_hatch() != bars.patches[2].get_hatch()
        assert "sd 0.1" in bars.get_title()
        lines = {line.get_label(): line for line in sweep.lines}
        assert list(lines) == [*labels, "∝ sd²"]
        np.testing.assert_allclose(lines["FPQ W2A4"].get_ydata().astype(float), 2 * np.array([0.0025, 0.01, 0.04]))
        assert (sweep.get_xscale(), sweep.get_yscale()) == ("log", "log")
        guide = next(line for line in sweep.lines if line.get_label() == "∝ sd²")
        np.testing.assert_allclose(np.diff(np.log(guide.get_ydata())) / np.diff(np.log(guide.get_xdata())), 2)

    def test_other_quantities_and_sizes(self, frame):
        axes = figure1(frame, quantity="probability_variance", sd=0.18).axes[0]
        assert "probabilities" in axes.get_ylabel()
        assert axes.patches[0].get_height() == pytest.approx(4 * 0.04)

    def test_several_seeds_are_a_mean_with_its_interval(self, frame):
        twin = [
            r for seed, v in ((1, 4.0), (2, 6.0)) for r in self.rows(f"again{seed}", "lsq", "W4A4", v, train_seed=seed)
        ]
        frame = pd.concat([frame, pd.DataFrame(twin)])
        bars = figure1(frame).axes[0]
        assert bars.patches[1].get_height() == pytest.approx(0.01 * 4)
        low, high = bars.collections[1].get_segments()[0][:, 1]
        assert high - low == pytest.approx(2 * over_seeds([0.02, 0.04, 0.06])[1])
        (points,) = [line for line in bars.lines if len(line.get_ydata()) == 3]
        np.testing.assert_allclose(sorted(points.get_ydata()), [0.02, 0.04, 0.06])
        assert "mean over 3 training seeds" in caption1(frame)

    def test_a_row_of_panels_for_each_network(self, frame):
        figure = figure1(pd.concat([frame, frame.assign(dataset="cifar10")]))
        assert [axes.get_title() for axes in figure.axes][::2] == [
            f"ResNet-20, {d}\nnoise of sd 0.1" for d in ("CIFAR-10", "digits")
        ]

    def test_the_caption_says_what_it_is(self, frame):
        text = caption1(frame)
        for fact in (
            "logits",
            "4 training images",
            "normalised",
            "digits",
            "95 %",
            "epoch 5",
            "not over training runs",
        ):
            assert fact in text

    def test_nothing(self):
        with pytest.raises(NothingToDraw, match="no finite logit_variance"):
            figure1(pd.DataFrame(columns=list(COLUMNS)).astype({"quantity": str}))

    def test_from_the_command_line(self, tiny_runs, tmp_path):
        runs = shutil.copytree(tiny_runs, tmp_path / "runs")
        where = ["--ckpt-dir", runs, "--model", "tests.nets:tiny", "--device", "cpu", "--figures", tmp_path]
        result = call("variance", *where, "--n-data", 16, "--n-draws", 3, "--sd", 0.15, "--sd", 0.3)
        assert all(len(line) <= 80 for line in result.stdout.splitlines())
        assert "noise of sd 0.15" in words(result.stdout)
        frame = records.load(runs, "output_variance")
        assert (tmp_path / "figure1.txt").read_text() == caption1(frame) + "\n"
        bars, _ = figure1(frame).axes
        last = frame[(frame["epoch"] == 2) & (frame["quantity"] == "logit_variance@0.15")].set_index("run")["value"]
        heights = [bar.get_height() for bar in bars.patches]
        assert heights == pytest.approx([last[run] for run in ("fp", "lsq-w4a4", "fpq-w4a4")])
