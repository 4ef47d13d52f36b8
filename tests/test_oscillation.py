"""Oscillating weights: counts against plain numpy."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fpq_analysis import Oscillation, QuantSpec, UserError, load, measure, oscillation, quantize
from fpq_analysis.cli import app
from fpq_analysis.errors import NothingToDraw
from fpq_analysis.methods import SCHEMES, load_class
from fpq_analysis.plots import oscillation_caption, oscillation_figure
from fpq_analysis.probes import Point
from fpq_analysis.probes.oscillation import threshold_distance
from fpq_analysis.quantizers import LSQ, PACT, LSQPlus, changed_fraction, weight_codes, weight_quantizers
from tests.nets import tiny
from tests.results import table_of
from tests.test_records_and_plots import row
from tests.words import words


def share(frame, quantity, layer="all"):
    return frame[(frame["layer"] == layer) & (frame["quantity"] == quantity)]["value"].item()


def positions(quantizer, w):
    """Where a weight lies among the codes, by the quantizer's formula, in numpy."""
    if type(quantizer).__name__ == "DoReFa":
        squashed = np.tanh(w)
        return quantizer.levels * (squashed / (2 * np.abs(squashed).max()) + 0.5)
    return w / quantizer.step_size.detach().numpy() + quantizer.zero_point.numpy()


@given(st.sampled_from(list(SCHEMES)), st.integers(2, 8), st.integers(0, 1000))
def test_codes_are_positions_rounded(scheme, bits, seed):
    torch.manual_seed(seed)
    x = torch.randn(4, 3, 3, 3)
    pair = SCHEMES[scheme]
    for quantizer in (load_class(pair.weight)(bits, 4, 4), load_class(pair.activation)(bits)):
        quantizer.calibrate(x, "mse")
        beyond = 1.5 * x
        rounded = quantizer.position(beyond).round().clamp(0, quantizer.levels)
        if isinstance(quantizer, PACT) and bool(quantizer.signed):
            rounded = rounded.clamp(0, quantizer.levels - 1)  # a signed grid has a level less
        assert torch.equal(quantizer.codes(beyond).float(), rounded)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("bits", ["W2A4", "W4A4"])
def test_counts_are_those_of_numpy(scheme, bits):
    eps = 0.15
    previous = quantize(tiny(), QuantSpec.parse(bits, scheme=scheme)).eval()
    model = copy.deepcopy(previous)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * p.abs().mean() * torch.randn_like(p)
    found = table_of(oscillation, model, previous, eps=eps)
    sums = np.zeros(5)
    old = weight_quantizers(previous)
    for name, (quantizer, weight) in weight_quantizers(model).items():
        w, w_old = weight.detach().numpy(), old[name][1].detach().numpy()
        levels = quantizer.levels
        place, place_old = positions(quantizer, w), positions(old[name][0], w_old)
        thresholds = np.arange(levels) + 0.5
        near = np.abs(place[..., None] - thresholds).min(-1) < eps

        def codes(place, levels=levels):
            return np.clip(np.rint(place), 0, levels)

        flipped = codes(place) != codes(place_old)
        by_step = flipped & (codes(positions(old[name][0], w)) == codes(place_old))
        counts = np.array([w.size, near.sum(), flipped.sum(), by_step.sum(), (near & flipped).sum()], float)
        sums += counts
        assert share(found, "near", name) == counts[1] / w.size
        assert share(found, "flipped", name) == counts[2] / w.size
        assert share(found, "flipped_step", name) == counts[3] / w.size
    assert 0 < sums[4] < sums[2]
    assert share(found, "near") == sums[1] / sums[0]
    assert share(found, "flipped") == sums[2] / sums[0]
    assert share(found, "flipped_step") == sums[3] / sums[0]
    assert share(found, "flipped_near") == sums[4] / sums[2]
    assert found["layer"].iloc[-1] == "all"


def test_distances_by_hand():
    quantizer = LSQ(2)
    with torch.no_grad():
        quantizer.step_size.fill_(0.5)
        quantizer.zero_point.fill_(1)
    # The codes 0 .. 3 stand for -0.5, 0, 0.5, 1; thresholds are at -0.25, 0.25, 0.75; what lies beyond has none.
    x = torch.tensor([-0.25, 0.0, 0.3, 0.75, 1.0, 1.25, 2.0, -0.5, -1.0])
    torch.testing.assert_close(
        threshold_distance(quantizer, x), torch.tensor([0.0, 0.5, 0.1, 0.0, 0.5, 1.0, 2.5, 0.5, 1.5])
    )
    shifted = LSQPlus(2)
    with torch.no_grad():
        shifted.step_size.fill_(0.5)
        shifted.offset.fill_(-0.5)
    torch.testing.assert_close(threshold_distance(shifted, x), threshold_distance(quantizer, x))


def test_weights_spread_evenly_are_near_in_2_eps():
    quantizer = LSQ(8)
    with torch.no_grad():
        quantizer.step_size.fill_(0.01)
        quantizer.zero_point.fill_(128)
    x = torch.linspace(-1.27, 1.26, 253_001, dtype=torch.float64)
    for eps in (0.05, 0.1, 0.3):
        near = (threshold_distance(quantizer.double(), x) < eps).double().mean()
        assert float(near) == pytest.approx(2 * eps, abs=1e-3)


def test_a_step_that_moves_alone_makes_all_the_flips():
    previous = quantize(tiny(), QuantSpec.parse("W4A4")).eval()
    model = copy.deepcopy(previous)
    with torch.no_grad():
        for quantizer, _ in weight_quantizers(model).values():
            quantizer.step_size *= 1.05
    found = table_of(oscillation, model, previous)
    assert share(found, "flipped") == share(found, "flipped_step") > 0
    same = table_of(oscillation, previous, previous)
    assert share(same, "flipped") == 0
    assert "flipped_near" not in set(same["quantity"])


def test_refusals():
    model = quantize(tiny(), QuantSpec.parse("W4A4")).eval()
    for eps in (0.0, 0.5, -1.0):
        with pytest.raises(UserError, match=r"between 0 and 0\.5"):
            Oscillation(eps)
    with pytest.raises(UserError, match="no quantized weights"):
        table_of(oscillation, tiny(), model)
    with pytest.raises(UserError, match="not one network"):
        table_of(oscillation, model, quantize(tiny(in_channels=3), QuantSpec.parse("W4A4")))


def test_every_checkpoint_but_the_first(tiny_runs, tmp_path):
    runs = shutil.copytree(tiny_runs, tmp_path / "runs")
    frame = measure(runs, Oscillation(), n_data=2, device="cpu", model="tests.nets:tiny")
    assert set(frame["method"]) == {"lsq", "fpq"}
    assert set(frame["epoch"]) == {1, 2}
    flipped = frame[(frame["layer"] == "all") & (frame["quantity"] == "flipped")]
    for run, rows in flipped.groupby("run"):
        states = [load(runs / run / f"epoch_000{i}.pt", "tests.nets:tiny") for i in range(3)]
        codes = [weight_codes(net) for net in states]
        shares = [changed_fraction(codes[i - 1], codes[i]) for i in rows["epoch"]]
        assert rows["value"].tolist() == pytest.approx(shares)
    assert (flipped[["sem", "ci95"]] == 0).all(axis=None)
    assert frame["value"].notna().all()  # where none flipped, there is no share of them


def test_a_missing_checkpoint_leaves_no_number_beside_the_others(tiny_runs, tmp_path):
    """Its flips are those of two epochs: the row says since when, and the line is broken."""
    run = shutil.copytree(tiny_runs / "lsq-w4a4", tmp_path / "lsq-w4a4")
    for epoch in (3, 4, 5, 6):
        content = torch.load(run / "epoch_0002.pt", weights_only=True)
        torch.save({**content, "epoch": epoch}, run / f"epoch_{epoch:04d}.pt")
    (run / "manifest.json").unlink()
    (run / "epoch_0004.pt").unlink()
    frame = measure(run, Oscillation(), n_data=2, device="cpu", model="tests.nets:tiny")
    since = frame[frame["quantity"] == "previous"].set_index("epoch")["value"]
    assert since.to_dict() == {1: 0, 2: 1, 3: 2, 5: 3, 6: 5}
    near, flipped = oscillation_figure(frame).axes
    assert np.isfinite(near.lines[0].get_ydata()).all()
    assert np.isfinite(flipped.lines[0].get_ydata()).tolist() == [True, True, True, False, True]
    assert "Lines are broken where a checkpoint is missing" in oscillation_caption(frame)
    # Of a run that keeps every other checkpoint nothing is missing.
    every_other = frame.assign(epoch=2 * frame["epoch"])
    every_other.loc[every_other["quantity"] == "previous", "value"] = every_other["epoch"] - 2
    assert "before, 2 epochs earlier, whether" in oscillation_caption(every_other)
    assert np.isfinite(oscillation_figure(every_other).axes[1].lines[0].get_ydata()).all()


def test_a_layer_where_none_flipped_has_no_row_of_those_near():
    model = quantize(tiny(), QuantSpec.parse("W4A4")).eval()
    rows = Oscillation()(Point(model, (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)), previous=model))
    assert "flipped" in {row["quantity"] for row in rows}
    assert "flipped_near" not in {row["quantity"] for row in rows}


# The figure and the command -------------------------------------------------------------------------------------------


def test_figure_draws_a_line_a_run_in_both_panels():
    rows = [
        row(f"{method}-{bits}", method, bits, epoch, value, quantity=quantity, probe="oscillation", estimator="counted")
        for method in ("lsq", "fpq")
        for bits in ("W4A4", "W2A4")
        for epoch in (1, 2, 3)
        for quantity, value in (("near", 0.2 + epoch / 100), ("flipped", 0.03 / epoch), ("eps", 0.1))
    ]
    frame = pd.DataFrame(rows)
    figure = oscillation_figure(frame)
    near, flipped = figure.axes
    names = {"LSQ W4A4", "LSQ W2A4", "FPQ W4A4", "FPQ W2A4"}
    lines = {line.get_label(): line for line in near.lines}
    assert set(lines) == {*names, "if spread evenly"}
    np.testing.assert_allclose(lines["LSQ W4A4"].get_ydata(), [0.21, 0.22, 0.23])
    assert lines["if spread evenly"].get_ydata()[0] == 0.2
    assert {line.get_label() for line in flipped.lines} == names
    np.testing.assert_allclose(flipped.lines[0].get_ydata(), [0.03, 0.015, 0.01])
    assert near.get_xlabel() == flipped.get_xlabel() == "Epoch"
    assert len(figure.legends[0].get_texts()) == 5
    assert len(oscillation_figure(pd.concat([frame, frame.assign(dataset="cifar10")])).axes) == 4
    assert "less than 0.1 steps" in oscillation_caption(frame)
    with pytest.raises(NothingToDraw, match="no oscillation"):
        oscillation_figure(frame[frame["quantity"] == "none"])


def test_command(tiny_runs, tmp_path):
    runs = shutil.copytree(tiny_runs, tmp_path / "runs")
    call = ["oscillation", "--ckpt-dir", str(runs), "--model", "tests.nets:tiny", "--device", "cpu"]
    call += ["--figures", str(tmp_path / "figures")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.stderr
    assert "20 % if spread evenly" in words(result.stdout)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert (tmp_path / "figures" / "oscillation.png").exists()
    rows = [json.loads(line) for line in CliRunner().invoke(app, [*call, "--json"]).stdout.splitlines()]
    found = {row["quantity"] for row in rows}
    some = any(row["value"] > 0 for row in rows if row["quantity"] == "flipped")
    assert found == {"near", "flipped", "flipped_step", "eps", "previous"} | ({"flipped_near"} if some else set())
    assert CliRunner().invoke(app, [*call, "--eps", "0.7"]).exit_code == 1
