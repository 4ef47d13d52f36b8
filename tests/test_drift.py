"""Drift against closed forms, SciPy and the distillation loss; its errors; the figures drawn from it."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from scipy import stats
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from fpq_analysis import QuantSpec, UserError, calibrate, feature_drift, quantize, records
from fpq_analysis.cli import app
from fpq_analysis.errors import NothingToDraw
from fpq_analysis.methods import METHODS
from fpq_analysis.plots import drift_caption, drift_figure, drift_layer_figure
from fpq_analysis.probes import Drift, Point, drift
from fpq_analysis.probes.drift import QUANTITIES
from fpq_analysis.records.comparison import difference
from fpq_analysis.training.csd import csd_loss
from tests.nets import tiny
from tests.words import words


def convolution(weight, bias=None) -> nn.Module:
    """1x1: (C_out, C_in) weights, so that the output of (N, C_in, 1, 1) is x W^T + b."""
    weight = torch.as_tensor(weight, dtype=torch.float64)
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1).double()
    with torch.no_grad():
        layer.weight.copy_(weight[:, :, None, None])
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else torch.as_tensor(bias, dtype=torch.float64))
    return nn.Sequential(layer)


def batch(n: int = 60, c: int = 2, size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, c, size, size, dtype=torch.float64), torch.zeros(n, dtype=torch.long)


def channels(found, quantity: str, layer: str = "0") -> np.ndarray:
    return found.channels.loc[found.channels["layer"] == layer, quantity].to_numpy()


def of(found, quantity: str, layer: str = "all"):
    return found.table[(found.table["layer"] == layer) & (found.table["quantity"] == quantity)].iloc[0]


def networks(bits: str = "W4A4", n: int = 40):
    """A quantized network, the float one it came from, and data; float64, BatchNorm not as fresh."""
    teacher = tiny().double().eval()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.normal_(module.bias, 0, 0.5)
    x = torch.randn(n, 1, 8, 8, dtype=torch.float64)
    student = quantize(teacher, QuantSpec.parse(bits)).double().eval()
    calibrate(student, x, "mse")
    return student, teacher, (x, torch.randint(10, (n,)))


class TestClosedForms:
    def test_a_copy_has_not_moved(self):
        _, teacher, data = networks()
        found = feature_drift(copy.deepcopy(teacher), teacher, data)
        for quantity in QUANTITIES:
            assert of(found, quantity).value == pytest.approx(0, abs=1e-14)
            assert of(found, quantity).sem_data == pytest.approx(0, abs=1e-14)

    @given(st.floats(-3, 3), st.floats(0.1, 5))
    def test_shifts_and_scales(self, shift, scale):
        """s = a t + b: the correlation is one, and every sorted value moves by (a - 1) t + b."""
        data = batch()
        teacher = convolution(torch.eye(2), [0.5, -1.0])
        student = convolution(scale * torch.eye(2), [0.5 * scale + shift, -scale + shift])
        found = feature_drift(student, teacher, data)
        t = teacher(data[0]).detach().transpose(0, 1).flatten(1).numpy()
        moved = (scale - 1) * t + shift
        sd = t.std(1)
        np.testing.assert_allclose(channels(found, "mean_shift"), moved.mean(1) / sd, atol=1e-12)
        np.testing.assert_allclose(channels(found, "decorrelation"), 0, atol=1e-12)
        np.testing.assert_allclose(channels(found, "wasserstein"), np.abs(moved).mean(1) / sd, atol=1e-12)
        if scale == 1:
            np.testing.assert_allclose(channels(found, "wasserstein"), abs(shift) / sd, atol=1e-12)

    def test_a_shift_is_the_wasserstein_distance(self):
        data = batch()
        found = feature_drift(convolution(torch.eye(2), [2.0, -3.0]), convolution(torch.eye(2)), data)
        sd = data[0].transpose(0, 1).flatten(1).std(1, correction=0).numpy()
        np.testing.assert_allclose(channels(found, "wasserstein"), np.array([2, 3]) / sd)
        np.testing.assert_allclose(channels(found, "mean_shift"), np.array([2, -3]) / sd)
        assert of(found, "mean_shift").value == pytest.approx(of(found, "wasserstein").value)  # sizes are averaged

    def test_mirrored_and_independent_features(self):
        data = batch(3000)
        found = feature_drift(convolution([[-1.0, 0], [1, 0]]), convolution(torch.eye(2)), data)
        mirrored, independent = channels(found, "decorrelation")
        assert mirrored == pytest.approx(2)
        assert independent == pytest.approx(1, abs=4 / np.sqrt(27_000))
        assert channels(found, "wasserstein")[1] == pytest.approx(0, abs=0.02)  # the same distribution

    def test_a_linear_layer_of_known_covariance(self):
        """corr(u.x, v.x) = u A v / sqrt(u A u v A v), for x of covariance A."""
        root = torch.tensor([[1.0, 0.4], [0.0, 0.8]], dtype=torch.float64)
        x = torch.einsum("ij,njab->niab", root, torch.randn(4000, 2, 2, 2, dtype=torch.float64)) + 0.7
        u, v = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        found = feature_drift(convolution(u), convolution(v), (x, torch.zeros(4000)))
        a = root @ root.T
        uv, uu, vv = ((p @ a * q).sum(1) for p, q in ((u, v), (u, u), (v, v)))
        np.testing.assert_allclose(channels(found, "decorrelation"), 1 - uv / (uu * vv).sqrt(), atol=0.04)
        np.testing.assert_allclose(channels(found, "mean_shift"), 0.7 * (u - v).sum(1) / vv.sqrt(), atol=0.05)


class TestAgainstOthers:
    @pytest.mark.parametrize("micro_batch", [None, 7])
    def test_scipy_and_numpy_layer_by_layer(self, micro_batch):
        student, teacher, data = networks("W2A4")
        found = feature_drift(student, teacher, data, micro_batch=micro_batch)
        for layer in ("0", "3", "6"):
            s, t = (
                net[: int(layer) + 1](data[0]).detach().transpose(0, 1).flatten(1).numpy() for net in (student, teacher)
            )
            sd = t.std(1)
            pairs = list(zip(s, t, strict=True))
            truths = {
                "mean_shift": (s.mean(1) - t.mean(1)) / sd,
                "decorrelation": np.array([1 - np.corrcoef(a, b)[0, 1] for a, b in pairs]),
                "wasserstein": np.array([stats.wasserstein_distance(a, b) for a, b in pairs]) / sd,
            }
            for quantity, truth in truths.items():
                np.testing.assert_allclose(channels(found, quantity, layer), truth, rtol=1e-9, err_msg=quantity)
                assert of(found, quantity, layer).value == pytest.approx(np.abs(truth).mean())
        assert not found.subsampled("all")
        for quantity in QUANTITIES:
            means = [of(found, quantity, layer).value for layer in ("0", "3", "6")]
            assert of(found, quantity).value == pytest.approx(np.mean(means))
        assert np.all(found.channels["wasserstein"] >= found.channels["mean_shift"].abs() - 1e-12)

    def test_twice_the_decorrelation_is_the_distillation_loss(self):
        student, teacher, data = networks()
        found = feature_drift(student, teacher, data)
        features = [[net[: i + 1](data[0]).detach() for i in (0, 3, 6)] for net in (student, teacher)]
        # Far from Eq. 15's epsilon: scale the features up.
        loss = csd_loss(*[[100 * f for f in side] for side in features])
        assert 2 * 3 * of(found, "decorrelation").value == pytest.approx(float(loss), rel=1e-4)

    def test_what_works_in_place_behind_makes_no_difference(self):
        student, teacher, data = networks()
        plain = feature_drift(student, teacher, data)
        for net in (student, teacher):
            for i in (2, 5, 8):
                net[i] = nn.ReLU(inplace=True)
        pd.testing.assert_frame_equal(plain.table, feature_drift(student, teacher, data).table)
        bare = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True)).double()  # right behind the convolution
        moved = feature_drift(bare, nn.Sequential(copy.deepcopy(bare[0])), (data[0], data[1]))
        assert of(moved, "wasserstein").value == 0


class TestSampling:
    def test_some_places_come_close_to_all(self, monkeypatch):
        student, teacher, data = networks("W2A4", 200)
        whole = feature_drift(student, teacher, data)
        monkeypatch.setattr(drift, "KEPT_VALUES", 200 * 32 * 10)
        part = feature_drift(student, teacher, data)
        assert (part.n_kept, part.n_places) == (200, 10)
        assert [part.subsampled(layer) for layer in ("0", "3", "6", "all")] == [True, True, False, True]
        for quantity in ("mean_shift", "decorrelation"):
            np.testing.assert_allclose(part.channels[quantity], whole.channels[quantity], rtol=1e-9)
        assert channels(part, "wasserstein", "6") == pytest.approx(channels(whole, "wasserstein", "6"))
        assert of(part, "wasserstein").value == pytest.approx(of(whole, "wasserstein").value, rel=0.05)
        monkeypatch.setattr(drift, "KEPT_VALUES", 100 * 32)
        few = feature_drift(student, teacher, data)
        assert (few.n_kept, few.n_places) == (100, 1)
        rows = {(r["layer"], r["quantity"]): r for r in Drift()(Point(student, data, teacher=teacher))}
        assert rows["all", "wasserstein"]["n_data"] == 100
        assert rows["all", "wasserstein"]["estimator"] == "up to 1 places an image"
        assert rows["all", "decorrelation"]["estimator"] == "all values"

    def test_the_jackknife_knows_the_spread_over_data(self):
        """Over 60 independent samples of images: the stated error is the spread, within their own errors."""
        student, teacher, _ = networks("W2A4")
        teacher, student = teacher[:4], student[:4]
        values, errors = {q: [] for q in QUANTITIES}, {q: [] for q in QUANTITIES}
        for _ in range(60):
            scale = torch.rand(50, 1, 1, 1, dtype=torch.float64) * 2  # images differ
            x = scale * torch.randn(50, 1, 8, 8, dtype=torch.float64) + scale / 2
            found = feature_drift(student, teacher, (x, torch.zeros(50)))
            for quantity in QUANTITIES:
                values[quantity].append(of(found, quantity).value)
                errors[quantity].append(of(found, quantity).sem_data)
        for quantity in QUANTITIES:
            spread = np.std(values[quantity], ddof=1)
            assert np.sqrt(np.mean(np.square(errors[quantity]))) == pytest.approx(spread, rel=0.3), quantity

    def test_blocks_give_value_and_error_and_pair(self):
        student, teacher, data = networks("W2A4")
        other = quantize(teacher, QuantSpec.parse("W4A4")).double().eval()
        calibrate(other, data[0], "mse")
        rows = []
        for net in (student, other):
            found = feature_drift(net, teacher, data)
            row = next(r for r in Drift()(Point(net, data, teacher=teacher)) if r["layer"] == "all" and r["samples"])
            assert np.mean(row["samples"]) == pytest.approx(row["value"])
            blocks = found.blocks[row["quantity"]]
            assert len(blocks) == 20
            assert blocks.std(ddof=1) / 20**0.5 == pytest.approx(row["sem_data"])
            assert row["ci95"] == pytest.approx(stats.t.ppf(0.975, 19) * row["sem_data"])
            rows.append(pd.Series({"run": "r", "epoch": 0, **row}))
        gap = difference(*rows)
        assert gap.paired
        assert gap.value == pytest.approx(rows[0]["value"] - rows[1]["value"])

    def test_one_image_has_no_error(self):
        student, teacher, data = networks(n=4)
        found = feature_drift(student, teacher, (data[0][:1], data[1][:1]))
        assert of(found, "wasserstein").value > 0
        assert np.isnan(of(found, "wasserstein").sem_data)


class TestConstantChannels:
    def test_a_constant_teacher_is_left_out_and_counted(self):
        data = batch()
        teacher = convolution([[1.0, 0], [0, 0], [0, 1]], [0.0, 3.0, 0.0])
        student = convolution([[1.0, 0], [1, 0], [0, 0]], [1.0, 0.0, 0.3])
        found = feature_drift(student, teacher, data)
        assert list(np.isnan(channels(found, "decorrelation"))) == [False, True, False]
        assert channels(found, "decorrelation")[2] == 1  # a constant student knows nothing
        assert of(found, "constant_channels").value == 1
        assert of(found, "decorrelation").value == pytest.approx(0.5)
        rows = {(r["layer"], r["quantity"]): r for r in Drift()(Point(student, data, teacher=teacher))}
        assert rows["0", "constant_channels"]["samples"] == [1]
        assert len(rows["0", "wasserstein"]["samples"]) == 2

    def test_a_layer_of_nothing_else(self):
        teacher = nn.Sequential(convolution(torch.zeros(2, 2)), convolution(torch.zeros(2, 2))).double()
        with pytest.raises(UserError, match="is constant"):
            feature_drift(copy.deepcopy(teacher), teacher, batch())
        teacher[0] = convolution(torch.eye(2))
        found = feature_drift(copy.deepcopy(teacher), teacher, batch())
        assert set(found.table.loc[found.table["layer"] == "1.0", "quantity"]) == {"constant_channels"}


class TestMisuse:
    def test_networks_that_do_not_fit(self):
        with pytest.raises(UserError, match="no convolution"):
            feature_drift(nn.Linear(2, 2), nn.Linear(2, 2), (torch.zeros(3, 2), torch.zeros(3)))
        with pytest.raises(UserError, match="differ at 0"):
            feature_drift(convolution(torch.eye(2)), convolution(torch.ones(3, 2)), batch())
        strided = nn.Sequential(nn.Conv2d(2, 2, 1, stride=2)).double()
        with pytest.raises(UserError, match="4 places an image, the teacher 9"):
            feature_drift(strided, convolution(torch.eye(2)), batch())

    def test_values_that_are_not_finite(self):
        x, y = batch()
        with pytest.raises(UserError, match="not finite"):
            feature_drift(convolution(torch.eye(2)), convolution(torch.eye(2)), (x / 0, y))

    def test_both_networks_are_left_as_they_were(self):
        student, teacher, data = networks()
        student.train()
        teacher.train()
        states = [copy.deepcopy(net.state_dict()) for net in (student, teacher)]
        rng = torch.random.get_rng_state()
        feature_drift(student, teacher, data)
        for net, state in zip((student, teacher), states, strict=True):
            assert net.training
            assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
            assert not any(module._forward_hooks for module in net.modules())
        assert torch.equal(rng, torch.random.get_rng_state())

    def test_functional_layers_behind_convolutions(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.idle = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)

            def forward(self, x):
                return F.relu_(self.used(x)).mean((2, 3))

        net = Net().double()
        assert list(feature_drift(net, copy.deepcopy(net), batch()).channels["layer"].unique()) == ["used"]


# --- Figures ---


@pytest.fixture(scope="module")
def frame():
    torch.manual_seed(0)
    rows = []
    for method, bits in (("lsq", "W4A4"), ("fpq", "W4A4"), ("lsq", "W2A4"), ("fpq", "W2A4")):
        student, teacher, data = networks(bits, 24)
        for epoch in range(3):
            with torch.no_grad():
                teacher[0].weight *= 1.1
            run = f"{method}-{bits}".lower()
            common = {"run": run, "method": method, "bits": bits, "epoch": epoch, "model": "tiny", "dataset": "digits"}
            common |= {"data": "f", "train_seed": 0, "seed": 0, "key": f"{run}{epoch}"}
            rows += [{**row, **common} for row in Drift()(Point(student, data, teacher=teacher))]
    return pd.DataFrame(rows, columns=list(records.COLUMNS))


PANELS = ("mean_shift", "decorrelation", "wasserstein")


def test_the_figure_shows_every_run_with_its_band(frame):
    figure = drift_figure(frame)
    assert len(figure.axes) == 3
    assert all(axes.get_ylabel() and "Epoch" in axes.get_xlabel() for axes in figure.axes)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["LSQ W4A4", "LSQ W2A4", "FPQ W4A4", "FPQ W2A4"]
    for quantity, axes in zip(PANELS, figure.axes, strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert len(lines) == len(axes.collections) == 4
        for run, rows in frame[(frame["layer"] == "all") & (frame["quantity"] == quantity)].groupby("run"):
            method, bits = run.split("-")
            line = lines[f"{method.upper()} {bits.upper()}"]
            np.testing.assert_allclose(line.get_xdata(), [0, 1, 2])
            np.testing.assert_allclose(line.get_ydata(), rows["value"])
            assert to_hex(line.get_color()) == METHODS[method].colour.lower()
        bands = [c.get_paths()[0].vertices[:, 1] for c in axes.collections]
        largest = frame[(frame["layer"] == "all") & (frame["quantity"] == quantity)]
        assert max(b.max() for b in bands) == pytest.approx((largest["value"] + largest["ci95"]).max())


def test_the_figure_by_layer_is_of_the_last_epoch(frame):
    figure = drift_layer_figure(frame)
    for quantity, axes in zip(PANELS, figure.axes, strict=True):
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "3", "6"]
        lines = {line.get_label(): line for line in axes.lines}
        rows = frame[(frame["run"] == "fpq-w2a4") & (frame["epoch"] == 2) & (frame["quantity"] == quantity)]
        np.testing.assert_allclose(lines["FPQ W2A4"].get_ydata(), rows[rows["layer"] != "all"]["value"])


def test_twins_scales_nothing_and_caption(frame):
    twin = frame[frame["run"] == "lsq-w4a4"].assign(run="again", value=100.0)
    axes = drift_figure(pd.concat([frame, twin])).axes[0]
    assert "LSQ W4A4 (again)" in {line.get_label() for line in axes.lines}
    assert axes.get_yscale() == "log"
    other = frame.assign(model="resnet18")
    assert len(drift_figure(pd.concat([frame, other])).axes) == 6
    for draw in (drift_figure, drift_layer_figure):
        with pytest.raises(NothingToDraw, match="no drift"):
            draw(pd.DataFrame(columns=list(records.COLUMNS)))
    text = drift_caption(frame)
    for fact in ("jackknife", "24 training images", "standard deviations", "digits", "raw outputs"):
        assert fact in text


def test_the_command(tiny_runs, tmp_path):
    runs = shutil.copytree(tiny_runs, tmp_path / "runs")
    arguments = ["drift", "--ckpt-dir", str(runs), "--model", "tests.nets:tiny", "--n-data", "32", "--device", "cpu"]
    arguments += ["--figures", str(tmp_path / "figures")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "0 done, 6 to do" in words(result.stderr)  # the float run has no teacher
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    for name in ("drift", "drift_layers"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 0
    frame = records.load(runs, "drift")
    start = frame[(frame["epoch"] == 0) & (frame["layer"] == "all")]
    for _, same in start.groupby("quantity")["value"]:  # both start from the same network
        np.testing.assert_allclose(same, same.iloc[0], rtol=1e-5)
    arguments[2] = str(runs / "fp")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert "the float network the run started from" in words(result.output)
    assert result.exit_code == 0
