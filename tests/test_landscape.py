"""Loss landscapes against closed forms, plain numpy, and networks built by hand at every point."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from typer.testing import CliRunner

from fpq_analysis import (
    LandscapeSettings,
    QuantSpec,
    UserError,
    calibrate,
    hessian_eigs,
    landscape,
    load,
    measure_landscapes,
    quantize,
    records,
)
from fpq_analysis.cli import app
from fpq_analysis.errors import NothingToDraw
from fpq_analysis.pipeline import store
from fpq_analysis.pipeline.execute import images
from fpq_analysis.pipeline.plan import plan
from fpq_analysis.pipeline.task import Sampling
from fpq_analysis.plots import landscape_caption, landscape_figure, surface_figure
from fpq_analysis.plots.landscape import levels, smoothed
from fpq_analysis.plots.landscape_html import surface_html
from fpq_analysis.probes.landscape import directions
from fpq_analysis.probes.landscape.grid import LossGrid
from fpq_analysis.probes.subject import prepare
from fpq_analysis.quantizers import latent_derivatives, view
from fpq_analysis.records.terrain import Terrain, terrains
from fpq_analysis.runs.checkpoint import read_checkpoint
from tests.nets import tiny
from tests.words import words

FAST = {"n_data": 24, "device": "cpu", "model": "tests.nets:tiny"}


class Rounding(nn.Linear):
    """Rounded to tenths, straight-through, by code that nobody told of."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight + (rounded(self.weight) - self.weight).detach(), self.bias)


def rounded(weight):
    return (10 * weight).round() / 10


def batch(n=20):
    return torch.randn(n, 1, 8, 8), torch.randint(10, (n,))


def settled(x, seed=0):
    """A network whose BatchNorm has statistics of its own."""
    torch.manual_seed(seed)
    model = tiny()
    for norm in (m for m in model if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    model.train()(x)
    return model.eval()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return batch()


@pytest.fixture(scope="module")
def quantized(data):
    model = quantize(settled(data[0]), QuantSpec.parse("W3A4", edge_bits=4))
    calibrate(model, data[0], "mse")
    with torch.no_grad():  # some weights out of range
        for name, p in model.named_parameters():
            if name.endswith("step_size") and p.ndim:
                p.mul_(0.6)
    return model.eval()


def mean_loss(model, data):
    with torch.no_grad():
        return float(F.cross_entropy(model(data[0]).double(), data[1], reduction="none").mean())


@pytest.fixture(scope="module")
def runs(tiny_runs, tmp_path_factory):
    return shutil.copytree(tiny_runs, tmp_path_factory.mktemp("landscapes") / "runs")


# --- The surface is the loss ---


@pytest.mark.parametrize("weights", ["dequantized", "requantized", "straight-through"])
def test_the_origin_is_the_network_itself_to_the_last_bit(quantized, data, weights):
    for model in (quantized, copy.deepcopy(quantized).to(memory_format=torch.channels_last)):
        found = landscape(model, data, weights=weights, points=3)
        assert found.loss[1, 1] == mean_loss(model, data)
        assert found.rise[1, 1] == found.rise_sem[1, 1] == 0
        assert found.axes[0].tolist() == [-1, 0, 1]
    found = landscape(quantized, data, weights="float", points=3)
    assert found.loss[1, 1] == mean_loss(view(quantized, "float"), data)


def by_hand(model, weights, move, masks):
    """The network at the centre plus `move`, built without any of the landscape's code."""
    plain = {"dequantized": "dequantized", "straight-through": "dequantized", "float": "float"}
    other = view(model, plain[weights]) if weights in plain else copy.deepcopy(model)
    with torch.no_grad():
        for name, step in move.items():
            layer = other.get_submodule(name.rpartition(".")[0])
            if weights == "straight-through" and name in masks:
                step = step * masks[name]
            if parametrize.is_parametrized(layer) and name.endswith("weight"):
                layer.parametrizations.weight.original.add_(step)
            else:
                getattr(layer, name.rpartition(".")[2]).add_(step)
    return other


@pytest.mark.parametrize("weights", ["dequantized", "requantized", "straight-through", "float"])
def test_every_point_is_the_loss_of_a_network_built_there(quantized, data, weights):
    model = copy.deepcopy(quantized).double()
    x, y = data[0].double(), data[1]
    found = landscape(model, (x, y), weights=weights, points=3, span=0.3, seed=5)
    masks = latent_derivatives(model)
    assert any((mask == 0).any() for mask in masks.values())
    for i, a in enumerate(found.axes[0]):
        for j, b in enumerate(found.axes[1]):
            one, two = found.directions
            net = by_hand(model, weights, {name: a * one[name] + b * two[name] for name in one}, masks)
            assert found.loss[i, j] == pytest.approx(mean_loss(net, (x, y)), rel=1e-10)


def test_errors_are_those_of_means_over_images(data):
    model = settled(data[0])
    found = landscape(model, data, dim=1, points=3)
    net = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(found.directions[0][name])
        there, here = (F.cross_entropy(m(data[0]).double(), data[1], reduction="none") for m in (net, model))
    n = math.sqrt(len(there))
    assert found.sem_data[2] == pytest.approx(float(there.std()) / n, rel=1e-5)
    assert found.rise[2] == pytest.approx(float((there - here).mean()), rel=1e-5)
    assert found.rise_sem[2] == pytest.approx(float((there - here).std()) / n, rel=1e-5)


def test_a_quadratic_network_has_a_quadratic_landscape():
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False).double()
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    loss = lambda outputs, targets: (outputs - targets).square().sum(1).mean()  # noqa: E731
    found = landscape(model, (x, y), loss=loss, points=5, span=2.0)
    w = model.weight.detach()
    for i, a in enumerate(found.axes[0]):
        for j, b in enumerate(found.axes[1]):
            moved = w + a * found.directions[0]["weight"] + b * found.directions[1]["weight"]
            assert found.loss[i, j] == pytest.approx(float((x @ moved.T - y).square().sum(1).mean()), rel=1e-12)
    assert "cosine" in {row["quantity"] for row in found.rows()}


def test_micro_batches_do_not_matter(quantized, data):
    whole, parts = (landscape(quantized, data, points=3, micro_batch=size) for size in (None, 3))
    np.testing.assert_allclose(whole.loss, parts.loss, rtol=1e-5)


def test_nothing_is_left_changed(quantized, data):
    state = {name: t.clone() for name, t in quantized.state_dict().items()}
    rng = torch.random.get_rng_state()
    other = copy.deepcopy(quantized)
    with torch.no_grad():
        other[0].parametrizations.weight.original.add_(0.1)
    theirs = {name: t.clone() for name, t in other.state_dict().items()}
    landscape(quantized, data, points=3, weights="requantized")
    landscape(quantized, data, points=3, plane="hessian", weights="straight-through")
    for batchnorm in ("interpolate", "re-estimate"):
        landscape(
            quantized,
            data,
            points=3,
            dim=1,
            plane="checkpoints",
            weights="requantized",
            auxiliary=[other],
            batchnorm=batchnorm,
        )
    assert all(torch.equal(t, quantized.state_dict()[name]) for name, t in state.items())
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in theirs.items())
    assert torch.equal(rng, torch.random.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in quantized.parameters())
    assert not quantized.training


# --- Directions ---


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
def test_filter_normalisation_is_that_of_the_paper(seed, filters, inputs):
    dice = np.random.default_rng(seed)
    d, w = dice.normal(size=(2, filters, inputs, 3, 3))
    found = directions.filter_normalised(torch.tensor(d), torch.tensor(w)).numpy()
    for i in range(filters):
        np.testing.assert_allclose(found[i], d[i] * np.linalg.norm(w[i]) / np.linalg.norm(d[i]), rtol=1e-12)
    assert not directions.filter_normalised(torch.tensor(d[0, 0, 0]), torch.tensor(w[0, 0, 0])).any()


def test_scale_in_front_of_batchnorm_does_not_matter(data):
    model = settled(data[0]).double()
    for norm in (m for m in model if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 1e-12
    other = copy.deepcopy(model)
    factors = torch.linspace(0.1, 30, 8).double()
    with torch.no_grad():
        other[0].weight.mul_(factors.view(-1, 1, 1, 1))
        other[1].running_mean.mul_(factors)
        other[1].running_var.mul_(factors.square())
    x = (data[0].double(), data[1])
    one, two = (landscape(net, x, points=5) for net in (model, other))
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-8)
    assert one.loss.std() > 0.1


def test_one_architecture_gets_the_same_draws(quantized, data):
    model = view(quantized, "float")
    one, two = (landscape(net, data, points=3, weights="float").directions[0] for net in (model, quantized))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(landscape(model, data, points=3, seed=1).directions[0]["0.weight"], one["0.weight"])
    for name, w in model.named_parameters():
        if w.ndim > 1:
            np.testing.assert_allclose(one[name].flatten(1).norm(dim=1), w.detach().flatten(1).norm(dim=1), rtol=1e-5)
        else:
            assert not one[name].any()


@pytest.mark.parametrize("weights", ["dequantized", "straight-through"])
def test_curvature_along_eigenvectors_is_the_eigenvalue(weights):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model = quantize(model, QuantSpec.parse("W4A32", edge_bits=4)).double()
    x, y = torch.randn(40, 4).double(), torch.randint(3, (40,))
    step = 1e-3
    found = landscape(model, (x, y), plane="hessian", weights=weights, points=3, span=step)
    definition = {"dequantized": "dequantized", "straight-through": "latent"}[weights]
    values = hessian_eigs(model, (x, y), 2, definition=definition, tol=1e-6).values
    second = [
        (found.rise[2, 1] + found.rise[0, 1]) / step**2,
        (found.rise[1, 2] + found.rise[1, 0]) / step**2,
    ]
    np.testing.assert_allclose(second, values, rtol=1e-4)
    by_quantity = {row["quantity"]: row["value"] for row in found.rows() if row["layer"] == "all"}
    np.testing.assert_allclose([by_quantity["eigenvalue_1"], by_quantity["eigenvalue_2"]], values, rtol=1e-4)
    assert by_quantity["norm_1"] == pytest.approx(1)
    assert abs(by_quantity["cosine"]) < 1e-6


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_components_are_those_of_a_singular_value_decomposition(seed, n):
    dice = np.random.default_rng(seed)
    points = dice.normal(size=(n, 12)) * np.geomspace(3, 0.3, n)[:, None]
    moves = [{"a": torch.tensor(row[:4]).view(2, 2), "b": torch.tensor(row[4:])} for row in points]
    axes, coordinates, explained = directions.principal(directions.gram(moves), 2)
    u, s, v = np.linalg.svd(points, full_matrices=False)
    np.testing.assert_allclose(np.abs(coordinates), np.abs(u[:, :2] * s[:2]), atol=1e-8)
    np.testing.assert_allclose(explained, s[:2] ** 2 / (s**2).sum(), rtol=1e-8)
    found = [directions.combination(moves, axis) for axis in axes.T]
    flat = np.stack([np.concatenate([t.numpy().ravel() for t in move.values()]) for move in found])
    np.testing.assert_allclose(np.abs(flat @ v[:2].T), np.eye(2), atol=1e-7)
    assert (coordinates[0] >= 0).all()


def test_grids_hold_their_points_exactly():
    for points in (3, 5, 25, 26, 51):
        grid = directions.unit_grid(points)
        assert len(grid) == points
        assert {0.0, 1.0} <= set(grid)
        grid = directions.covering_grid([3.1, -0.7, 2.0], points)
        assert len(grid) == points
        assert 0.0 in grid
        assert grid[0] <= -0.7 - 0.9
        assert grid[-1] >= 3.1 + 0.9
    assert directions.symmetric_grid(7, 0.1)[3] == 0.0


# --- Planes of checkpoints ---


def trajectory(data, n=4):
    """Networks that differ in everything: weights, BatchNorm's statistics, scales."""
    nets = []
    for place in range(n):
        model = quantize(settled(data[0] + 0.1 * place, seed=7), QuantSpec.parse("W4A4"))
        calibrate(model, data[0] * (1 + 0.2 * place), "mse")
        torch.manual_seed(place)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn_like(p) * (0.02 if "step_size" in name else 0.1) * p.abs())
        nets.append(model.double().eval())
    return nets, (data[0].double(), data[1])


@pytest.mark.parametrize("weights", ["dequantized", "requantized", "float"])
def test_all_checkpoints_lie_on_their_plane(data, weights):
    nets, data = trajectory(data, 3)
    found = landscape(nets[0], data, plane="checkpoints", weights=weights, auxiliary=nets[1:], points=5)
    rows = {row["quantity"]: row for row in found.rows() if row["layer"] == "all"}
    kind = "float" if weights == "float" else "dequantized"
    for place, net in enumerate(nets, 1):
        # BatchNorm's statistics and the scales have moved too: the network is itself again.
        assert rows[f"point_{place}"]["value"] == pytest.approx(mean_loss(view(net, kind), data), rel=1e-9)
        if weights != "requantized":  # rounding may tip over where w0 + (w1 - w0) is not w1 to the last bit
            assert abs(rows[f"gap_{place}"]["value"]) < 1e-9
        assert rows[f"off_plane_{place}"]["value"] < 1e-6
    at = [rows[f"point_{place}"]["samples"] for place in (1, 2, 3)]
    weights_of = [
        torch.cat([p.flatten() for p in prepare(net, data, definition=kind).parameters.values()]) for net in nets
    ]
    if weights != "requantized":
        for i, j in ((0, 1), (0, 2), (1, 2)):
            distance = float((weights_of[i] - weights_of[j]).detach().norm())
            assert math.dist(at[i], at[j]) == pytest.approx(distance, rel=1e-6)


def test_a_line_runs_from_one_checkpoint_to_the_other(data):
    nets, data = trajectory(data, 2)
    found = landscape(nets[0], data, plane="checkpoints", dim=1, auxiliary=[nets[1]], points=7)
    place = [found.axes[0].tolist().index(end) for end in (0.0, 1.0)]
    assert found.loss[place[0]] == mean_loss(nets[0], data)
    assert found.loss[place[1]] == pytest.approx(mean_loss(nets[1], data), rel=1e-9)
    re_estimated = landscape(
        nets[0], data, plane="checkpoints", dim=1, auxiliary=[nets[1]], points=7, batchnorm="re-estimate"
    )
    net = copy.deepcopy(nets[1])
    for norm in (m for m in net if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
        norm.train()
    net(data[0])
    assert re_estimated.loss[place[1]] == pytest.approx(mean_loss(net.eval(), data), rel=1e-9)


def test_projections_of_a_trajectory_and_their_gaps(data):
    nets, data = trajectory(data)
    found = landscape(nets[-1], data, plane="pca", auxiliary=nets[:-1], points=5, weights="float")
    rows = {row["quantity"]: row for row in found.rows() if row["layer"] == "all"}
    shadows = [view(net, "float") for net in nets]
    flat = torch.stack(
        [torch.cat([p.detach().flatten() for _, p in sorted(net.named_parameters())]) for net in shadows]
    )
    away = (flat - flat[-1]).numpy()[:-1]
    _, s, v = np.linalg.svd(away, full_matrices=False)
    assert rows["explained_1"]["value"] == pytest.approx(s[0] ** 2 / (s**2).sum(), rel=1e-8)
    for place, net in enumerate(shadows[:-1], 1):
        assert rows[f"point_{place}"]["value"] == pytest.approx(mean_loss(net, data), rel=1e-9)
        inside = away[place - 1] @ v[:2].T
        np.testing.assert_allclose(np.abs(rows[f"point_{place}"]["samples"]), np.abs(inside), rtol=1e-6)
        rest = np.linalg.norm(away[place - 1] - inside @ v[:2]) / np.linalg.norm(away[place - 1])
        assert rows[f"off_plane_{place}"]["value"] == pytest.approx(rest, rel=1e-5)
        gap = rows[f"point_{place}"]["value"] - rows[f"projection_{place}"]["value"]
        assert rows[f"gap_{place}"]["value"] == pytest.approx(gap, abs=1e-12)
        assert rows[f"gap_{place}"]["value"] != 0
    # The projected network, with statistics moved by the same combination of checkpoints, built by hand.
    a, b = rows["point_1"]["samples"]
    coefficients = np.linalg.lstsq(
        away.T, a * flat_of(found.directions[0]) + b * flat_of(found.directions[1]), rcond=None
    )[0]
    net = copy.deepcopy(shadows[-1])
    state = {
        name: t
        + sum(float(c) * (other.state_dict()[name] - t) for c, other in zip(coefficients, shadows[:-1], strict=True))
        for name, t in net.state_dict().items()
        if t.is_floating_point()
    }
    net.load_state_dict(state, strict=False)
    assert rows["projection_1"]["value"] == pytest.approx(mean_loss(net, data), rel=1e-8)
    assert rows["gap_4"]["value"] == 0


def flat_of(move):
    return np.concatenate([move[name].flatten().numpy() for name in sorted(move)])


def test_a_scale_that_a_line_would_make_negative_stays_positive(data):
    nets, data = trajectory(data, 2)
    with torch.no_grad():
        for (name, p), (_, q) in zip(nets[0].named_parameters(), nets[1].named_parameters(), strict=True):
            if name.endswith("step_size"):
                q.copy_(p * 9)
        for p, q in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
            q.copy_(p)
    found = landscape(nets[0], data, plane="checkpoints", dim=1, weights="requantized", auxiliary=[nets[1]], points=7)
    assert found.axes[0][0] < -0.2
    assert np.isfinite(found.loss).all()


# --- What it refuses, and what it flags ---


def test_aliasing_is_flagged(quantized, data):
    fine, coarse = (landscape(quantized, data, weights="requantized", points=3, span=span) for span in (0.01, 1.0))
    assert not fine.aliased
    assert coarse.aliased
    rows = {row["quantity"]: row for row in coarse.rows() if row["layer"] == "all"}
    squares, total = 0.0, 0
    for name, mask in latent_derivatives(quantized).items():
        layer = quantized.get_submodule(name.removesuffix(".weight"))
        ratio = coarse.directions[0][name] / layer.parametrizations.weight[0].step_size.detach()
        squares, total = squares + float(ratio.double().square().sum()), total + mask.numel()
    assert rows["steps_1"]["value"] == pytest.approx(math.sqrt(squares / total), rel=1e-6)
    assert rows["steps_1"]["status"] == "aliased"
    assert rows["loss_1_1"]["status"] == "aliased"
    assert "quantization steps" in landscape_caption(coarse.frame("a"))
    assert "quantization steps" not in landscape_caption(fine.frame("a"))
    assert not landscape(quantized, data, points=3).aliased  # nothing is rounded again


def test_a_loss_that_overflows_is_a_row_with_a_status(data, tmp_path):
    model = settled(data[0])
    found = landscape(model, data, points=3, span=1e20)
    assert np.isfinite(found.loss[1, 1])
    assert not np.isfinite(found.loss[0, 0])
    about = {"key": "k", "settings": "s", "method": "fp", "model": "m", "dataset": "d", "bits": "FP", "epoch": 0}
    records.append(tmp_path, "landscape", [{**about, **row} for row in found.rows()])
    frame = records.load(tmp_path, "landscape")
    corner = frame[frame["quantity"] == "loss_1_1"].iloc[0]
    assert "not finite" in corner["status"]
    assert "not finite" in landscape_caption(frame)
    assert landscape_figure(frame).axes[0].patch.get_hatch()
    assert isinstance(surface_figure(frame), Figure)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plane": "hesian"}, "did you mean 'hessian'"),
        ({"weights": "latent"}, "Known: dequantized, requantized"),
        ({"dim": 3}, "a line .* or a plane"),
        ({"points": 4}, "odd number"),
        ({"points": 1}, "at least 3"),
        ({"span": -1.0}, "above zero"),
        ({"batchnorm": "re-estimate"}, "stay as they are"),
        ({"plane": "pca", "span": 1.0}, "covers these"),
        ({"plane": "pca", "weights": "straight-through"}, "rounding residue of the centre"),
        ({"plane": "checkpoints"}, "a line .* goes through two"),
        ({"plane": "pca"}, "needs at least 3"),
        ({"auxiliary": [nn.Linear(1, 1)]}, "about one network"),
    ],
)
def test_what_makes_no_sense_is_refused(data, options, words):
    with pytest.raises(UserError, match=words):
        landscape(tiny().eval(), data, **{"points": 3, **options})


def test_networks_that_are_not_alike_are_refused(quantized, data):
    for other in (settled(data[0], seed=9), quantize(settled(data[0], seed=9), QuantSpec.parse("W4A4"))):
        with pytest.raises(UserError, match="not of one architecture and quantization"):
            landscape(quantized, data, plane="checkpoints", dim=1, auxiliary=[other], points=3)
        landscape(quantized, data, plane="checkpoints", dim=1, auxiliary=[other], points=3, weights="float")
    with pytest.raises(UserError, match="equal"):
        landscape(quantized, data, plane="checkpoints", dim=1, auxiliary=[quantized], points=3)
    half = copy.deepcopy(quantized)
    with torch.no_grad():
        half[11].bias.add_(1.0)
    twice = copy.deepcopy(half)
    with torch.no_grad():
        twice[11].bias.add_(1.0)
    for plane in ("checkpoints", "pca"):
        with pytest.raises(UserError, match="one line|on a line"):
            landscape(quantized, data, plane=plane, auxiliary=[half, twice], points=3)
    mixing = quantize(settled(data[0]), QuantSpec.parse("W4A4", scheme="pact"))
    calibrate(mixing, data[0], "mse")
    with pytest.raises(UserError, match="mixes weights"):
        landscape(mixing.eval(), data, weights="straight-through", points=3)
    assert landscape(mixing.eval(), data, weights="requantized", points=3).loss[1, 1] == mean_loss(mixing, data)


# --- On disk ---


def losses(frame):
    rows = frame[frame["quantity"].str.startswith("loss_")]
    return rows.set_index("quantity")["value"].sort_index()


def test_what_a_kill_leaves_is_gone_on_with(runs, tmp_path, monkeypatch):
    whole = measure_landscapes(shutil.copytree(runs / "fp", tmp_path / "whole"), LandscapeSettings(points=5), **FAST)
    assert len(losses(whole)) == 25
    run = shutil.copytree(runs / "fp", tmp_path / "run")
    monkeypatch.setattr(store, "FLUSH", 0.0)
    done = []
    measure = LossGrid.measure

    def killed(self, piece):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(piece)
        return measure(self, piece)

    monkeypatch.setattr(LossGrid, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_landscapes(run, LandscapeSettings(points=5), **FAST)
    path = run / "records" / "landscape.jsonl"
    path.write_text(path.read_text()[:-30])  # and its last row torn
    rest = []
    monkeypatch.setattr(LossGrid, "measure", lambda self, piece: rest.append(piece) or measure(self, piece))
    frame = measure_landscapes(run, LandscapeSettings(points=5), **FAST)
    assert rest == LandscapeSettings(points=5).pieces(0)[6:]
    pd.testing.assert_series_equal(losses(frame), losses(whole))
    rest.clear()
    measure_landscapes(run, LandscapeSettings(points=5), **FAST)
    assert not rest
    measure_landscapes(run, LandscapeSettings(points=5), overwrite=True, **FAST)
    assert len(rest) == 25
    assert (
        plan(run, LandscapeSettings(points=5, weights="float"), Sampling(24), epochs="last").n_left == 25
    )  # another landscape


def test_shards_add_up(runs, tmp_path):
    run = shutil.copytree(runs / "lsq-w4a4", tmp_path / "run")
    other = shutil.copytree(runs / "lsq-w4a4", tmp_path / "other")
    recipe = LandscapeSettings("pca", points=4)
    whole = measure_landscapes(other, recipe, **FAST)
    for shard in ((1, 3), (3, 3)):
        frame = measure_landscapes(run, recipe, shard=shard, **FAST)
    assert len(losses(frame)) == 11
    assert not terrains(frame)
    assert not (run / "records" / "landscape.jsonl").exists()
    measure_landscapes(run, recipe, shard=(2, 3), **FAST)
    frame = measure_landscapes(run, recipe, **FAST)  # gathers
    pd.testing.assert_series_equal(losses(frame), losses(whole))
    loaded = records.load(run, "landscape")
    pd.testing.assert_series_equal(losses(loaded), losses(whole))
    (terrain,) = terrains(loaded)
    assert terrain.networks["epoch"].tolist() == [0, 1, 2]
    assert len(set(terrain.networks["checkpoint"])) == 3


def test_other_directions_do_not_go_into_one_landscape(runs, tmp_path):
    run = shutil.copytree(runs / "fp", tmp_path / "run")
    measure_landscapes(run, LandscapeSettings(points=5), shard=(1, 2), **FAST)
    path = run / "records" / "landscape.1of2.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["quantity"] == "signature_1":
            row["value"] += 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="come out otherwise"):
        measure_landscapes(run, LandscapeSettings(points=5), **FAST)


def test_planes_through_runs(runs):
    ends = [runs / "lsq-w4a4", runs / "fpq-w4a4"]
    frame = measure_landscapes("", LandscapeSettings("checkpoints", dim=1, points=5), through=ends, **FAST)
    assert set(frame["run"]) == {"lsq-w4a4"}
    points = frame[frame["quantity"].str.startswith("point_")]
    assert points["method"].tolist() == ["lsq", "fpq"]
    sampling = Sampling(24, device="cpu")
    for row, end in zip(points.to_dict("records"), ends, strict=True):
        net = load(end / "epoch_0002.pt", "tests.nets:tiny").to(memory_format=torch.channels_last)
        content = read_checkpoint(end / "epoch_0002.pt")
        assert row["value"] == pytest.approx(mean_loss(net, images(content, sampling)), rel=1e-6)
    assert plan("", LandscapeSettings("checkpoints", dim=1), through=[ends[0] / "epoch_0001.pt", ends[1]]).n_left
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        plan("", LandscapeSettings("checkpoints", dim=1), through=["nothing", ends[1]])
    with pytest.raises(UserError, match="two or three of them"):
        plan(runs, LandscapeSettings("checkpoints", dim=1))
    with pytest.raises(UserError, match="at least 2 samples"):
        Sampling(1)


# --- Figures ---


def test_the_figure_shows_what_was_measured(runs):
    frame = measure_landscapes(runs, LandscapeSettings("pca", points=5, weights="float"), **FAST)
    found = terrains(frame)
    assert [terrain.title for terrain in found] == ["FP", "FPQ W4A4", "LSQ W4A4"]
    for terrain in found:
        rows = frame[(frame["key"] == terrain.first["key"]) & (frame["layer"] == "all")].set_index("quantity")
        for i in range(5):
            for j in range(5):
                assert terrain.loss[i, j] == rows["value"][f"loss_{i + 1}_{j + 1}"]
                assert terrain.rise_half[i, j] == rows["ci95"][f"rise_{i + 1}_{j + 1}"]
    figure = landscape_figure(frame)
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["FP", "LSQ W4A4", "FPQ W4A4"]
    for axes, terrain in zip(panels, (found[0], found[2], found[1]), strict=True):
        path, circles, star = axes.lines
        np.testing.assert_array_equal(path.get_xdata(), terrain.networks["x"])
        np.testing.assert_array_equal(circles.get_ydata(), terrain.networks["y"])
        assert star.get_xdata() == star.get_ydata() == 0
        assert {text.get_text() for text in axes.texts} >= {"epoch 0", "epoch 2"}
        assert axes.get_xlabel().startswith("Component 1 (")
        assert len(axes.collections) >= 2
    assert figure.axes[3].get_ylabel() == "Mean loss"
    caption = landscape_caption(frame)
    for fact in ("5 x 5", "uncentred PCA of 3 checkpoints", "float", "24 training images", "seed 0", "moved linearly"):
        assert fact in caption
    surfaces = surface_figure(frame)
    assert len(surfaces.axes) == 3
    assert surfaces.axes[0].get_zlabel() == "Mean loss"


@pytest.mark.parametrize("wide", [False, True])
def test_contours_run_through_every_point_and_invent_no_minimum(wide):
    dice = np.random.default_rng(0)
    x, y = np.linspace(-1, 1, 7), np.linspace(-2, 1, 5)
    terrain = made_up(x, y, dice.exponential(1, (7, 5)) + 0.1)
    fine_x, fine_y, loss = smoothed(terrain, wide)
    rows, columns = np.searchsorted(fine_x, x), np.searchsorted(fine_y, y)
    np.testing.assert_allclose(loss[np.ix_(rows, columns)], terrain.loss)
    assert loss.min() == pytest.approx(terrain.loss.min())
    assert loss.max() == pytest.approx(terrain.loss.max())
    for rough in (replace(terrain, aliased=True), made_up(x, y, np.where(terrain.loss > 1, np.nan, terrain.loss))):
        assert smoothed(rough, wide)[2] is rough.loss


def made_up(x, y, loss):
    nothing = np.zeros_like(loss)
    return Terrain("", (x, y), loss, nothing, nothing, nothing, ("", ""), pd.DataFrame(), False, 0.0, False, 0.0, {})


def test_lines_are_drawn_with_their_bands(runs):
    frame = measure_landscapes(runs, LandscapeSettings(dim=1, points=5), **FAST)
    (axes,) = landscape_figure(frame).axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    found = {terrain.title: terrain for terrain in terrains(frame)}
    assert set(lines) == set(found) == {"FP", "FPQ W4A4", "LSQ W4A4"}
    for name, line in lines.items():
        np.testing.assert_array_equal(line.get_ydata(), found[name].loss)
    assert len({line.get_marker() for line in lines.values()}) == 3  # in grey they were alike
    assert axes.get_ylabel() == "Mean loss"
    with pytest.raises(NothingToDraw, match="no complete plane"):
        surface_figure(frame)
    with pytest.raises(NothingToDraw, match="no complete landscape"):
        landscape_figure(
            frame[frame["quantity"] != "loss_3"].assign(quantity=lambda f: f["quantity"].replace("rise_3", ""))
        )


def test_levels_follow_the_losses():
    at, wide = levels([np.array([0.01, 30.0]), np.array([np.nan, 0.5])])
    assert wide
    assert 5 <= len(at) <= 15
    assert at[0] >= 0.01
    at, wide = levels([np.array([1.0, 3.0])])
    assert not wide
    assert at[0] <= 1.0
    assert at[-1] >= 3.0


def test_a_python_landscape_draws_itself(quantized, data, tmp_path):
    frame = landscape(quantized, data, points=3).frame("mine")
    assert landscape_figure(frame).axes[0].get_title() == "mine"
    pytest.importorskip("plotly")
    text = surface_html(frame, tmp_path / "new" / "page.html").read_text()
    assert "filter-normalised" in text
    assert "<script src=" not in text  # nothing to fetch


def test_command(runs, tmp_path, monkeypatch):
    def call(*arguments, code=0):
        result = CliRunner().invoke(app, ["landscape", *map(str, arguments)], env={"COLUMNS": "80"})
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    common = ["--model", "tests.nets:tiny", "--n-data", 24, "--device", "cpu", "--figures", tmp_path]
    here = ["--ckpt-dir", shutil.copytree(runs / "fpq-w4a4", tmp_path / "run"), "--points", 3, *common]
    assert "dim is 0" in call(*here, "--dim", 0, code=1).stderr
    result = call(*here, "--weights", "requantized")
    assert "0 done, 9 to do" in words(result.stderr)
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "Aliased" in result.stdout
    for name in ("landscape", "surface"):
        assert "rounded again" in (tmp_path / f"{name}.txt").read_text()
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    monkeypatch.setattr("fpq_analysis.cli.measuring.draw", lambda *arguments: [])  # drawn once is enough
    rows = [json.loads(line) for line in call(*here, "--weights", "requantized", "--json").stdout.splitlines()]
    corner = [row for row in rows if row["quantity"] == "loss_1_3"]
    assert [(row["axis_1"], row["axis_2"], row["status"]) for row in corner] == [(-1.0, 1.0, "aliased")]
    assert "to do" in call(*here, "--span", 0.5, "--dry-run").stdout
    assert "without --shard" in " ".join(call(*here, "--span", 0.5, "--shard", "1/2").stderr.split())
    both = ["--through", runs / "lsq-w4a4", "--through", runs / "fpq-w4a4"]
    call(*both, "--points", 5, *common)
    assert "two planes" in words(call(*both, "--plane", "pca", *common, code=1).stderr)
    assert "a checkpoint of epoch 9" in " ".join(call(*here, "--epoch", 9, code=1).stderr.split())
    monkeypatch.setattr("fpq_analysis.plots.landscape_html.find_spec", lambda name: None)
    assert "fpq-analysis[html]" in "".join(call(*here, "--html", code=1).stderr.split("\n"))


@pytest.mark.filterwarnings("error")
def test_of_a_single_image_no_error_is_known():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    rows = landscape(model, (torch.randn(1, 1, 2, 2), torch.tensor([1])), points=3).frame()
    losses = rows[rows["quantity"].str.startswith("loss")]
    assert losses["value"].notna().all()
    assert losses["sem_data"].isna().all()


def test_weights_that_other_code_rounds_are_rounded_again_at_every_point():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Rounding(64, 10)).double()
    x, y = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.randint(10, (20,))
    with pytest.raises(UserError, match="--weights requantized"):
        landscape(model, (x, y), points=3, dim=1)
    found = landscape(model, (x, y), points=5, dim=1, weights="requantized")
    (direction,) = directions.random_directions({"1.weight": model[1].weight, "1.bias": model[1].bias}, 1, 0)
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    for place, loss in zip(np.linspace(-1, 1, 5), found.loss, strict=True):
        logits = x.flatten(1) @ rounded(weight + place * direction["1.weight"]).T + bias + place * direction["1.bias"]
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-12)
