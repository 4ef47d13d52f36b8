"""Feature statistics against closed forms and plain tensors; which layer a name means; the figures drawn from them."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from fpq_analysis import QuantSpec, UserError, calibrate, feature_statistics, quantize, records
from fpq_analysis.cli import app
from fpq_analysis.errors import NothingToDraw
from fpq_analysis.models import MODELS, ResNet
from fpq_analysis.plots import caption3, caption4, figure3, figure4
from fpq_analysis.plots.figure3 import BOX, MEAN
from fpq_analysis.plots.figure4 import smooth
from fpq_analysis.probes import Features, Point, features
from fpq_analysis.probes.features import QUANTILES
from fpq_analysis.probes.sites import find_site
from fpq_analysis.quantizers import view
from tests.nets import CalledTwice, tiny
from tests.words import words


def images(n: int = 40, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, channels, 8, 8, dtype=torch.float64), torch.randint(10, (n,))


def net(inplace: bool = False) -> nn.Module:
    """With BatchNorm statistics that are not those of a fresh network."""
    model = tiny().double().eval()
    for i, module in enumerate(model):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.normal_(module.bias, 0, 0.5)
        if isinstance(module, nn.ReLU):
            model[i] = nn.ReLU(inplace=inplace)
    return model


def quantized(bits: str = "W4A4") -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    batch = images()
    model = quantize(net(), QuantSpec.parse(bits)).double()
    calibrate(model, batch[0], "mse")
    return model, batch


class Functional(nn.Module):
    """A ReLU that is no module, and one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(1 if i == 0 else 3, 3, 3, padding=1) for i in range(3))
        self.act = nn.ReLU()
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        x = self.act(self.second(F.relu(self.first(x))))
        return self.act(self.third(x)).mean((2, 3))


class TestStatistics:
    def test_a_linear_layer_of_known_covariance(self):
        """z = W x with x of covariance A A^T: variances diag(W A A^T W^T), means W m, normal quantiles."""
        a, m = torch.randn(3, 3).double(), torch.tensor([1.0, -2.0, 0.5]).double()
        layer = nn.Linear(3, 4, bias=False).double()
        x = torch.randn(4000, 3).double() @ a.T + m
        found = feature_statistics(layer, (x, torch.zeros(4000)), layer="")
        w = layer.weight.detach()
        sd = (w @ a @ a.T @ w.T).diagonal().sqrt().numpy()
        mean = (w @ m).numpy()
        table = found.channels
        assert np.all(np.abs(table["mean"] - mean) < 4 * table["mean_sem"])
        np.testing.assert_allclose(table["mean_sem"], sd / math.sqrt(4000), rtol=0.05)
        np.testing.assert_allclose(table["sd"], sd, rtol=0.05)
        np.testing.assert_allclose(table["q99"], mean + 2.3263 * sd, atol=0.12 * sd.max())
        np.testing.assert_allclose(table["median"], mean, atol=0.08 * sd.max())
        assert found.quantized is None

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("layer", ["3", "4", "5"])
    def test_equals_plain_tensors_whatever_works_in_place_behind(self, inplace, layer):
        model, batch = net(inplace), images()
        x = batch[0]
        with torch.no_grad():
            for module in list(net_copy(model))[: int(layer) + 1]:
                x = module(x)
        found = feature_statistics(model, batch, layer=layer)
        values = x.transpose(0, 1).flatten(1).numpy()
        table = found.channels
        for name, truth in {
            "min": values.min(1),
            "max": values.max(1),
            "mean": values.mean(1),
            "sd": values.std(1),
            **{name: np.quantile(values, q, axis=1) for name, q in QUANTILES.items()},
            "mean_sem": x.mean((2, 3)).std(0).numpy() / math.sqrt(len(x)),
        }.items():
            np.testing.assert_allclose(table[name], truth, rtol=1e-12, atol=1e-13, err_msg=name)
        assert found.sem_data["mean"] == pytest.approx(float(x.mean((1, 2, 3)).std()) / math.sqrt(len(x)))
        assert (found.n_data, found.n_kept, len(table)) == (40, 40, 8)

    def test_what_the_next_quantizer_makes_of_it(self):
        model, batch = quantized()
        found = feature_statistics(model, batch, layer="2")
        quantizer = model[3].input_quantizer
        assert found.quantized is not None
        taken = feature_statistics(model, batch, layer="3.input_quantizer").channels
        pd.testing.assert_frame_equal(found.quantized, taken)
        steps = found.quantized["max"].to_numpy() / quantizer.step_size.item()
        np.testing.assert_allclose(steps, steps.round(), atol=1e-6)
        raw = feature_statistics(model, batch, layer="3:input")
        pd.testing.assert_frame_equal(raw.channels, found.channels)
        pd.testing.assert_frame_equal(raw.quantized, found.quantized)
        assert set(found.sem_data) == {"mean", "quantized_mean"}

    def test_micro_batches_make_no_difference(self):
        model, batch = quantized()
        first, second = (feature_statistics(model, batch, micro_batch=m) for m in (7, 40))
        pd.testing.assert_frame_equal(first.channels, second.channels, rtol=1e-12)
        np.testing.assert_allclose(first.densities, second.densities, rtol=1e-12)
        assert list(first.images) == list(second.images)

    def test_quantiles_from_some_images(self, monkeypatch):
        model, batch = net(), images()
        size = 8 * 4 * 4
        monkeypatch.setattr(features, "KEPT_VALUES", 10 * size + 1)
        found = feature_statistics(model, batch, layer="5", seed=3)
        assert (found.n_kept, found.n_data) == (10, 40)
        whole = feature_statistics(model, (batch[0], batch[1]), layer="5")
        np.testing.assert_allclose(found.channels["mean"], whole.channels["mean"])
        chosen = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:10]
        part = feature_statistics(model, (batch[0][chosen], batch[1][chosen]), layer="5")
        np.testing.assert_allclose(found.channels["median"], part.channels["median"])
        rows = {row["quantity"]: row for row in Features("5")(Point(model, batch, seed=3))}
        assert rows["median"]["n_data"] == 10
        assert rows["median"]["sem"] is None
        assert rows["mean"]["n_data"] == 40

    def test_densities(self):
        model, batch = net(), images()
        found = feature_statistics(model, batch, layer="5", n_images=4, seed=1)
        width = found.edges[1] - found.edges[0]
        assert math.log2(width) == round(math.log2(width))
        assert found.edges[0] == 0
        assert 60 <= len(found.edges) <= features.BINS + 3
        values = model[:6](batch[0]).detach()[torch.as_tensor(found.images)].flatten(1).numpy()
        for image, density, zeros in zip(values, found.densities, found.zeros, strict=True):
            assert zeros == pytest.approx((image == 0).mean())
            assert (density * width).sum() == pytest.approx((image != 0).mean())
            inside = (image > 10 * width) & (image < 20 * width)
            assert (density[10:20] * width).sum() == pytest.approx(inside.mean())
        assert set(found.images) != set(feature_statistics(model, batch, n_images=4, seed=2).images)

    def test_densities_where_all_is_zero(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU()).double()
        nn.init.zeros_(model[0].weight)
        found = feature_statistics(model, images(5), layer="1")
        assert np.all(found.zeros == 1)
        assert np.all(found.densities == 0)

    def test_the_model_is_left_as_it_was(self):
        model, batch = quantized()
        model.train()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        feature_statistics(model, batch)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
        assert model.training
        assert not any(module._forward_hooks for module in model.modules())


def net_copy(model):
    return view(model, "latent")


class TestWhichLayer:
    @pytest.mark.parametrize(
        ("name", "layer"),
        [("resnet18", "stages.1.1.relu1"), ("resnet20", "stages.1.1.relu1"), ("mobilenet_v2", "features.11.layers.5")],
    )
    def test_auto_is_in_the_middle_and_feeds_one_convolution(self, name, layer):
        assert find_site(MODELS[name]().eval(), "auto", torch.randn(1, 3, 8, 8)).name == layer

    def test_auto_without_an_activation_of_its_own(self):
        batch = images(4)
        model = Functional().double()
        found = feature_statistics(model, batch)
        assert found.layer == "second:input"
        expected = F.relu(model.first(batch[0])).mean((0, 2, 3)).detach()
        np.testing.assert_allclose(found.channels["mean"], expected)

    def test_a_batchnorm_changed_in_place_is_not_what_the_convolution_takes(self):
        model, batch = net(inplace=True), images()
        model = quantize(model, QuantSpec.parse("W4A4")).double()
        calibrate(model, batch[0], "mse")
        assert feature_statistics(model, batch, layer="1").quantized is None
        assert feature_statistics(model, batch, layer="2").quantized is not None

    def test_two_quantizers_are_no_one_answer(self):
        model = quantize(ResNet([1, 1], [4, 8], True).eval(), QuantSpec.parse("W4A4"))
        assert find_site(model, "stages.0.0.relu2", torch.randn(1, 3, 8, 8)).quantizer is None
        assert find_site(model, "stages.0.0.relu1", torch.randn(1, 3, 8, 8)).quantizer is not None

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            ("frist", "no layer 'frist'. The nearest names: first"),
            ("act", "called 2 times.*third:input"),
            ("idle", "called 0 times"),
            ("idle:input", "called 0 times"),
        ],
    )
    def test_no_such_layer(self, layer, message):
        with pytest.raises(UserError, match=message):
            feature_statistics(Functional().double(), images(4), layer=layer)

    def test_outputs_without_channels_and_values_that_are_not_finite(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(0)).double()
        with pytest.raises(UserError, match=r"no tensor of shape \(N, C"):
            feature_statistics(model, images(4), layer="1")
        x, y = images(4)
        with pytest.raises(UserError, match="not finite"):
            feature_statistics(model, (x * math.nan, y), layer="0")
        with pytest.raises(UserError, match="name a layer"):
            feature_statistics(nn.Flatten(), images(4))

    def test_a_layer_called_twice_is_refused_by_itself(self):
        with pytest.raises(UserError, match="called 2 times"):
            feature_statistics(CalledTwice(), (torch.randn(3, 6), torch.zeros(3)), layer="layer")


# --- Rows and figures ---


def measured(seed: int = 0, epochs: tuple[int, ...] = (0, 2)) -> pd.DataFrame:
    """Records as the probe writes them: a float run, LSQ and FPQ at two widths, numbers of their own."""
    rows = []
    batch = (torch.randn(20, 1, 8, 8), torch.randint(10, (20,)))
    for run, method, bits in (
        ("fp", "fp", "FP"),
        *((f"{m}-{b}".lower(), m, b) for b in ("W4A4", "W2A4") for m in ("lsq", "fpq")),
    ):
        for epoch in epochs:
            model = tiny().eval()
            nn.init.normal_(model[4].bias)
            if bits != "FP":
                model = quantize(model, QuantSpec.parse(bits))
                calibrate(model, batch[0], "mse")
            common = {"run": run, "method": method, "bits": bits, "epoch": epoch, "model": "tiny", "dataset": "digits"}
            common |= {"data": "f", "train_seed": 0, "seed": seed, "key": f"{run}{epoch}"}
            rows += [{**row, **common} for row in Features("5")(Point(model, batch, seed=seed))]
    return pd.DataFrame(rows, columns=list(records.COLUMNS))


@pytest.fixture(scope="module")
def frame():
    torch.manual_seed(1)
    return measured()


def number(frame, run, quantity, column="samples"):
    rows = frame[(frame["run"] == run) & (frame["quantity"] == quantity) & (frame["epoch"] == 2)]
    return rows[column].iloc[0]


def test_rows_hold_the_statistics():
    model, batch = quantized()
    found = feature_statistics(model, batch, seed=3)
    rows = {row["quantity"]: row for row in Features()(Point(model, batch, seed=3))}
    for name, column in found.channels.items():
        np.testing.assert_allclose(rows[name]["samples"], column, rtol=1e-6)
        assert rows[name]["value"] == pytest.approx(column.mean())
    np.testing.assert_allclose(rows["quantized_max"]["samples"], found.quantized["max"], rtol=1e-6)
    assert rows["mean"]["ci95"] == pytest.approx(1.96 * found.sem_data["mean"])
    np.testing.assert_allclose(rows["density_edges"]["samples"], found.edges)
    np.testing.assert_allclose(rows["density_2"]["samples"], found.densities[1], rtol=1e-6)
    assert rows["density_2"]["value"] == pytest.approx(1 - found.zeros[1])
    assert rows["density_images"]["samples"] == list(found.images)
    assert rows["channels"]["value"] == 8


class TestFigure3:
    def test_float_above_and_the_lowest_fpq_run_below(self, frame):
        figure = figure3(frame)
        above, below, shifts = figure.axes
        assert above.get_title() == "FP, epoch 2"
        assert below.get_title() == "FPQ W2A4, epoch 2"
        assert above.get_ylim() == below.get_ylim()
        assert "Channel of 5" in shifts.get_xlabel()

    def test_the_shifts_of_the_means_have_both_errors(self, frame):
        points, (_, _, (bars,)) = figure3(frame).axes[2].containers[0][0], figure3(frame).axes[2].containers[0].lines
        theirs, ours = (np.array(number(frame, run, "mean")) for run in ("fp", "fpq-w2a4"))
        np.testing.assert_allclose(points.get_ydata(), ours - theirs)
        half = 1.96 * np.hypot(*(number(frame, run, "mean_sem") for run in ("fp", "fpq-w2a4")))
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, np.stack([ours - theirs - half, ours - theirs + half], 1))
        old = frame[frame["quantity"] != "mean_sem"]
        assert not figure3(old).axes[2].containers[0].lines[2]

    @pytest.mark.parametrize("run", ["fpq-w2a4", "lsq-w4a4"])
    def test_the_artists_are_the_records(self, frame, run):
        figure = figure3(frame, run)
        for axes, name in zip(figure.axes[:2], ("fp", run), strict=True):
            orange = [line for line in axes.lines if to_hex(line.get_color()) == MEAN.lower()]
            heights = [line.get_ydata()[0] for line in orange]
            np.testing.assert_allclose(heights, number(frame, name, "mean"))
            assert not np.allclose(heights, number(frame, name, "median"))
            boxes = [patch.get_path().vertices[:, 1] for patch in axes.patches]
            np.testing.assert_allclose([box.min() for box in boxes], number(frame, name, "q25"))
            np.testing.assert_allclose([box.max() for box in boxes], number(frame, name, "q75"))
            low, high, _, _, median, _ = (axes.lines[i : 6 * len(boxes) : 6] for i in range(6))  # as bxp draws them
            np.testing.assert_allclose([line.get_ydata()[1] for line in low], number(frame, name, "q01"))
            np.testing.assert_allclose([line.get_ydata()[1] for line in high], number(frame, name, "q99"))
            np.testing.assert_allclose([line.get_ydata()[0] for line in median], number(frame, name, "median"))
            assert not any(line.get_linewidth() for line in median)
            dots = next(line for line in axes.lines if line.get_marker() == ".")
            np.testing.assert_allclose(dots.get_ydata(), number(frame, name, "max"))
            assert list(dots.get_xdata()) == list(range(1, 9))

    def test_at_most_32_channels(self, frame):
        wide = frame.assign(
            samples=[s * 5 if q in BOX else s for s, q in zip(frame["samples"], frame["quantity"], strict=True)]
        )
        assert len(figure3(wide).axes[0].patches) == 32
        assert "channels 1-32 of 40" in caption3(wide)

    def test_other_choices_of_runs(self, frame):
        assert "LSQ W2A4" in figure3(frame[frame["method"] != "fpq"]).axes[1].get_title()
        assert len(figure3(frame[frame["method"] == "fp"]).axes) == 1
        assert len(figure3(frame[frame["method"] == "lsq"]).axes) == 1
        beside = frame[frame["run"] == "fp"].assign(run="a/fp", train_seed=1)
        assert "fp (FP, epoch 2, training seed 0," in caption3(pd.concat([beside, frame]))
        with pytest.raises(NothingToDraw, match="no channel statistics"):
            figure3(pd.DataFrame(columns=list(records.COLUMNS)))
        with pytest.raises(NothingToDraw, match="quantized run 'x'"):
            figure3(frame, "x")

    def test_caption(self, frame):
        text = caption3(frame)
        for fact in ("mean, not the median", "fpq-w2a4", "fp (FP", "20 training images", "seed 0", "before the next"):
            assert fact in text


class TestFigure4:
    def test_a_row_for_each_width_and_a_panel_for_each_image(self, frame):
        figure = figure4(frame)
        assert len(figure.axes) == 6
        images = number(frame, "fp", "density_images")
        titles = [f"{bits}, sample {i:.0f}" for bits in ("W4A4", "W2A4") for i in images]
        assert [axes.get_title() for axes in figure.axes] == titles
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FP", "LSQ", "FPQ"]

    def test_the_curves_are_the_records_smoothed(self, frame):
        figure = figure4(frame)
        for place, axes in enumerate(figure.axes):
            bits = ("w4a4", "w2a4")[place // 3]
            runs = ("fp", f"lsq-{bits}", f"fpq-{bits}")
            assert [to_hex(line.get_color()) for line in axes.lines] == ["#0072b2", "#d55e00", "#009e73"]
            assert len({line.get_linestyle() for line in axes.lines}) == 3
            for run, line in zip(runs, axes.lines, strict=True):
                x, y = line.get_data()
                mass = number(frame, run, f"density_{place % 3 + 1}", "value")  # one less the share of zeros
                assert np.trapezoid(y, x) == pytest.approx(mass, rel=5e-3)
            assert axes.get_ylim()[1] > max(line.get_ydata().max() for line in axes.lines)

    @given(seed=st.integers(0, 100), width=st.floats(0.1, 1.0), reflect=st.booleans())
    def test_smoothing_keeps_the_mass_and_the_moments(self, seed, width, reflect):
        dice = np.random.default_rng(seed)
        edges = np.arange(9) * 0.5
        density = dice.dirichlet(np.ones(8)) / 0.5
        x = np.linspace(0.0 if reflect else -8.0, 12.0, 8001)
        y = smooth(edges, density, width, reflect, x)
        assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-4)
        middles = edges[:-1] + 0.25
        # The second moment about zero is that of the histogram and the kernel's, folded at zero or not.
        second = 0.5 * density @ (middles**2 + 0.5**2 / 12) + width**2
        assert np.trapezoid(y * x**2, x) == pytest.approx(second, rel=1e-3)

    def test_fewer_runs(self, frame):
        assert len(figure4(frame[frame["method"] == "fp"]).axes) == 3
        pact = frame[frame["method"] == "lsq"].assign(method="pact")
        assert len(figure4(pact).axes) == 6
        twice = pd.concat([frame, frame[frame["run"] == "lsq-w4a4"].assign(run="again", train_seed=1)])
        assert len(figure4(twice).legends[0].get_texts()) == 3
        with pytest.raises(NothingToDraw, match="no density"):
            figure4(pd.DataFrame(columns=list(records.COLUMNS)))

    def test_caption(self, frame):
        text = caption4(frame)
        for fact in ("20 measured on", "exactly zero", "seed 0", "lsq-w2a4 at epoch 2", "output of 5"):
            assert fact in text


def test_the_command(tiny_runs, tmp_path):
    runs = shutil.copytree(tiny_runs, tmp_path / "runs")
    arguments = ["features", "--ckpt-dir", str(runs), "--model", "tests.nets:tiny", "--n-data", "16"]
    arguments += ["--device", "cpu", "--figures", str(tmp_path / "figures")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "Output of 5" in words(result.stdout)
    for name in ("figure3", "figure4"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 0
    assert "9 done, 0 to do" in CliRunner().invoke(app, arguments).stderr
    result = CliRunner().invoke(app, [*arguments, "--layer", "relu7"], env={"COLUMNS": "80"})
    assert result.exit_code == 1
    assert words(result.stderr).count("no layer 'relu7'") == 1  # not once for each of nine checkpoints
    assert "9 of 9 checkpoints" in words(result.stderr)
