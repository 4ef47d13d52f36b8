"""The monitor: training goes on to the same bits, and its rows are those of saved checkpoints."""

from __future__ import annotations

import copy
import json
import random
import threading
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from fpq_analysis import (
    CSDLoss,
    CurvatureMonitor,
    ForeignRuns,
    HessianTrace,
    LandscapeSettings,
    Oscillation,
    OutputVariance,
    QuantSpec,
    StochasticFeaturePerturbation,
    UserError,
    calibrate,
    draw_figures,
    hessian_trace,
    measure,
    quantize,
    write_report,
)
from fpq_analysis.cli.app import app
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.losses import Loss
from fpq_analysis.probes import Drift, GradNorm

# What the rows of a monitor share with those of saved files, to the letter and but for rounding.
SAME = ["epoch", "layer", "quantity", "bits", "method", "dataset", "data", "seed", "settings", "probe", "definition"]
SAME += ["loss", "dtype", "status", "estimator", "n_data", "n_products"]
NUMBERS = ["value", "sem", "sem_data", "ci95", "samples"]


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def network() -> nn.Module:
    """With BatchNorm and Dropout, whose state and draws would tell; `head` is last."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 2),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def train(model, x, y, monitor=lambda model, epoch: None, save=lambda model, epoch: None, epochs=3):
    """A loop that draws from every global random state; what it ends with."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    drawn = []
    for epoch in range(epochs + 1):
        save(model, epoch)
        monitor(model, epoch)
        model.train()
        for index in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
        drawn += [float(torch.rand(())), np.random.rand(), random.random()]  # noqa: NPY002
    return {**model.state_dict(), "drawn": torch.tensor(drawn, dtype=torch.float64)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("quantized", [False, True])
def test_training_goes_on_to_the_same_bits_and_rows_are_those_of_saved_files(quantized, digits, tmp_path):
    x, y = training_sample(digits, 128, 5)
    model = network()
    if quantized:
        model = quantize(model, QuantSpec.parse("W4A4"))
        calibrate(model, x, "mse")
    probes = [
        HessianTrace(),
        OutputVariance(n_draws=3),
        *([Oscillation(), HessianTrace("latent")] if quantized else []),
    ]
    plain = train(copy.deepcopy(model), x, y)
    seen = []
    monitor = CurvatureMonitor(
        probes, digits, n_data=64, out=tmp_path / "live", log=lambda row, epoch: seen.append((epoch, row))
    )
    files = tmp_path / "files"
    files.mkdir()
    modes = []

    def watched(network, epoch):
        network.train(epoch % 2 == 0)
        network[5].eval()
        before = {name: module.training for name, module in network.named_modules()}
        grads = [p.grad if p.grad is None else p.grad.clone() for p in network.parameters()]
        with torch.no_grad():
            monitor(network, epoch)
        modes.append(before == {name: module.training for name, module in network.named_modules()})
        assert all(
            g is p.grad is None or torch.equal(g, p.grad) for g, p in zip(grads, network.parameters(), strict=True)
        )

    def save(network, epoch):
        torch.save(network.state_dict(), files / f"epoch_{epoch}.pt")

    measured = train(copy.deepcopy(model), x, y, watched, save)
    assert equal(plain, measured)
    assert all(modes)
    assert [epoch for epoch, _ in seen] == [0, 1, 2, 3]

    spec = QuantSpec.parse("W4A4") if quantized else None
    source = ForeignRuns(files, network, "digits", quant=spec)
    for probe in probes:
        frames = measure(source, probe, n_data=64, device="cpu"), measure(tmp_path / "live", probe, n_data=64)
        assert len(frames[0]) == len(frames[1]) > 0
        saved, live = (f.sort_values(["epoch", "layer", "quantity"], ignore_index=True) for f in frames)
        pd.testing.assert_frame_equal(saved[SAME], live[SAME])
        pd.testing.assert_frame_equal(saved[NUMBERS], live[NUMBERS], rtol=1e-4, atol=1e-7)
    assert len(monitor.frame()) == sum(len(measure(tmp_path / "live", probe, n_data=64)) for probe in probes)
    trace = measure(tmp_path / "live", HessianTrace(), n_data=64)
    values = trace[(trace["layer"] == "all") & (trace["quantity"] == "trace")]["value"].tolist()
    assert [row["hessian_trace_dequantized/trace" if quantized else "hessian_trace/trace"] for _, row in seen] == values


def quick(tmp_path, digits, name="live", **options):
    return CurvatureMonitor([HessianTrace()], digits, n_data=32, out=tmp_path / name, **options)


def test_what_it_writes_is_a_run_for_tables_figures_comparisons_and_reports(digits, tmp_path):
    for name, method in (("a", "fpq"), ("b", "lsq")):
        monitor = quick(tmp_path / "runs", digits, name, about={"method": method, "model": "mine", "train_seed": 3})
        for epoch in range(3):
            monitor(network().eval(), epoch)
    done = CliRunner().invoke(app, ["hessian", "--ckpt-dir", "runs", "--n-data", "32"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("exact") == 6
    done = CliRunner().invoke(app, ["hessian", "--ckpt-dir", "runs/a", "--n-data", "32", "--epochs", "last", "--json"])
    assert {json.loads(line)["epoch"] for line in done.stdout.splitlines()} == {2}
    done = CliRunner().invoke(app, ["compare", "runs/a", "runs/b", "--n-data", "32"])
    assert done.exit_code == 0, done.output
    assert "Paired, sample by sample: 32" in done.stdout
    drawn = draw_figures(tmp_path / "runs", ["5"], measure=False, log=lambda line: None)
    assert drawn["path"].notna().all()
    page = tmp_path / "page.html"
    assert write_report(tmp_path / "runs", page).runs == 2
    assert "mine" in page.read_text()
    with pytest.raises(UserError, match=r"measured by a monitor.*give the --n-data"):
        measure(tmp_path / "runs", HessianTrace(), n_data=16)
    with pytest.raises(UserError, match=r"measured by a monitor.*no records"):
        measure(tmp_path / "runs", GradNorm(), n_data=32)


def test_it_measures_what_every_divides_and_keeps_the_previous_network_of_every_call(digits, tmp_path):
    model = quantize(network(), QuantSpec.parse("W4A4"))
    calibrate(model, training_sample(digits, 32, 0)[0], "mse")
    monitor = CurvatureMonitor([HessianTrace(), Oscillation()], digits, n_data=32, out=tmp_path / "live", every=2)
    numbers = []
    for epoch in range(5):
        with torch.no_grad():
            model[3].parametrizations.weight.original.add_(0.05 * epoch)
        numbers.append(monitor(model, epoch))
        assert monitor(model, epoch) == {}  # once an epoch
    assert [bool(row) for row in numbers] == [True, False, True, False, True]
    frame = monitor.frame()
    assert sorted(frame[frame["probe"] == "oscillation"]["epoch"].unique()) == [2, 4]  # there is none before 0
    changed = frame[(frame["probe"] == "oscillation") & (frame["layer"] == "3")]
    assert (changed["value"] > 0).any()


def test_a_landscape_is_measured_too(digits, tmp_path):
    settings = LandscapeSettings(points=3)
    monitor = CurvatureMonitor(settings, digits, n_data=16, out=tmp_path / "live")
    assert monitor(network(), 0) == {}  # no single number
    frame = measure(tmp_path / "live", settings, n_data=16)
    assert len(frame) == len(monitor.frame()) > 9


def test_a_training_that_goes_on_keeps_what_was_and_removes_what_is_later(digits, tmp_path):
    models = [network() for _ in range(5)]
    monitor = quick(tmp_path, digits)
    for epoch in range(4):
        monitor(models[epoch], epoch)
    with pytest.raises(UserError, match=r"resume=True.*overwrite=True"):
        quick(tmp_path, digits)
    monitor = quick(tmp_path, digits, resume=True)
    kept = monitor.frame()
    assert monitor(models[2], 2) == pytest.approx(numbers_of(kept, 2))
    assert sorted(monitor.frame()["epoch"].unique()) == [0, 1, 2]
    assert len(monitor.frame()) == len(kept[kept["epoch"] < 3])  # the same network is not measured again
    monitor(models[4], 3)
    assert numbers_of(monitor.frame(), 3) != numbers_of(kept, 3)
    quick(tmp_path, digits, overwrite=True)(models[0], 7)
    assert set(monitor.frame()["epoch"]) == {7}


def numbers_of(frame, epoch):
    rows = frame[(frame["epoch"] == epoch) & (frame["layer"] == "all")]
    found = {f"hessian_trace/{q}": v for q, v in zip(rows["quantity"], rows["value"], strict=True) if v == v}
    intervals = zip(rows["quantity"], rows["ci95"], strict=True)
    return found | {f"hessian_trace/{q}_ci95": v for q, v in intervals if v == v}


def test_it_stops_at_its_budget_with_a_word(digits, tmp_path):
    monitor = quick(tmp_path, digits, budget_seconds=1e-9)
    model = network()
    assert monitor(model, 0)
    with pytest.warns(UserWarning, match=r"hessian_trace is not measured at epoch 1: .* budget_seconds is 1e-09"):
        assert monitor(model, 1) == {}
    with warnings.catch_warnings(action="error"):
        assert monitor(model, 2) == {}  # said once
    assert set(monitor.frame()["epoch"]) == {0}


class Unlucky(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.how = how
        if how == "a lock":
            self.held = threading.Lock()

    def forward(self, x):
        if self.how == "raises":
            raise ValueError("no such luck")
        return self.layer(x) * (float("nan") if self.how == "diverged" else 1)


@pytest.mark.parametrize(
    ("how", "word"),
    [("raises", "no such luck"), ("diverged", "not finite"), ("a lock", "cannot be copied"), ("text", "nn.Module")],
)
def test_what_cannot_be_measured_does_not_stop_the_training(how, word, tmp_path):
    data = torch.randn(16, 4), torch.randint(3, (16,))
    monitor = CurvatureMonitor([HessianTrace()], data, out=tmp_path / "live")
    with pytest.warns(UserWarning, match=rf"(?s)Epoch 0.*{word}.*The training goes on"):
        assert monitor("a network" if how == "text" else Unlucky(how), 0) == {}
    assert monitor(Unlucky("well"), 1)
    monitor = CurvatureMonitor([HessianTrace()], data, out=tmp_path / "log", log=lambda row, epoch: 1 / 0)
    with pytest.warns(UserWarning, match=r"Epoch 0, log: .*ZeroDivisionError"):
        assert monitor(Unlucky("well"), 0)


def test_wrappers_are_taken_off_and_hooks_of_the_training_left_out(digits, tmp_path):
    model = network()
    called = []
    model[0].register_full_backward_hook(lambda *args: called.append("backward"))
    reference = quick(tmp_path, digits)(model, 0)
    assert not called
    assert len(model[0]._backward_hooks) == 1
    assert quick(tmp_path, digits, "dp")(nn.DataParallel(model), 0) == reference
    assert quick(tmp_path, digits, "compiled")(torch.compile(model), 0) == reference
    accelerated = copy.deepcopy(model)
    accelerated._original_forward = accelerated.forward
    coarse = torch.autocast("cpu", torch.bfloat16)(type(accelerated).forward)
    accelerated.forward = types.MethodType(coarse, accelerated)
    assert quick(tmp_path, digits, "accelerated")(accelerated, 0) == reference
    assert accelerated(torch.zeros(2, 1, 8, 8)).dtype == torch.bfloat16
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert quick(tmp_path, digits, "inference")(model, 0) == reference


def test_parts_of_weights_are_not_measured(tmp_path, digits):
    model = network()
    model[0].weight.ds_id = 3  # as ZeRO-3 marks them
    with pytest.warns(UserWarning, match="spread over several processes"):
        assert quick(tmp_path, digits)(model, 0) == {}


def test_only_the_first_process_measures(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert bool(quick(tmp_path, digits)(network(), 0)) == (rank == 0)


def test_inside_of_feature_noise_and_distillation_the_training_is_the_same(digits, tmp_path):
    x, y = training_sample(digits, 64, 0)
    teacher = network().eval()
    start = quantize(teacher, QuantSpec.parse("W4A4"))
    calibrate(start, x, "mse")

    def losses(monitor):
        model = copy.deepcopy(start)
        torch.manual_seed(0)
        with StochasticFeaturePerturbation(model, p=0.5) as noise, CSDLoss(model.train(), teacher) as csd:
            for step in range(3):
                logits = model(x)
                monitor(model, step)
                (F.cross_entropy(logits, y) + csd(x)).backward()
        assert noise.handles == []
        return [p.grad for p in model.parameters()]

    plain, monitored = losses(lambda model, step: None), losses(quick(tmp_path, digits))
    assert all(map(torch.equal, plain, monitored))


def test_a_loader_is_gone_through_without_a_draw(tmp_path):
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    monitor = CurvatureMonitor([HessianTrace()], loader, n_data=20, out=tmp_path / "live")
    assert torch.equal(state, torch.get_rng_state())
    assert len(monitor.data.batches[0]) == 20
    assert monitor(Unlucky("well"), 0)


class Named(nn.Linear):
    def forward(self, values):
        return {"scores": super().forward(values), "hidden": values}


def test_batches_of_any_form_and_calls_of_ones_own(tmp_path):
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    torch.manual_seed(0)
    network = Named(4, 3)
    call = {"forward": lambda model, inputs: model(**inputs)["scores"]}
    found = []
    for place, data in enumerate([{"values": x, "labels": y}, [({"values": x}, y)]]):
        monitor = CurvatureMonitor([HessianTrace()], data, out=tmp_path / str(place), **call)
        found.append(monitor(network, 0)["hessian_trace/trace"])
    plain = nn.Linear(4, 3)
    plain.load_state_dict(network.state_dict())
    assert found == pytest.approx([hessian_trace(plain, (x, y)).value] * 2, rel=1e-5)


def test_a_loss_of_ones_own_is_measured_and_named(tmp_path):
    x, y = torch.randn(20, 4), torch.randn(20, 3)
    huber = Loss("huber", lambda outputs, targets: F.huber_loss(outputs, targets, reduction="none").mean(1))
    for loss, name in ((huber, "huber"), ("squared_error", "squared_error"), (F.mse_loss, "squared_error")):
        monitor = CurvatureMonitor([HessianTrace()], (x, y), out=tmp_path / name, loss=loss, overwrite=True)
        assert monitor(Unlucky("well"), 0)
        assert set(monitor.frame()["loss"]) == {name}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"every": 0}, "every is 0"),
        ({"probes": Drift()}, "give it as teacher="),
        ({"about": {"Method": "x"}}, "did you mean 'method'"),
        ({"data": (torch.zeros(3, 4), torch.zeros(2))}, "3 inputs and 2 targets"),
        ({"data": []}, "no data"),
        ({"data": torch.zeros(3, 4)}, "The data are a Tensor"),
        ({"loss": "hinge"}, "Unknown loss"),
        ({"n_data": 1}, "at least 2"),
        ({"every": 1.5}, "every is 1.5"),
        ({"budget_seconds": -1}, "cannot be below zero"),
        ({"budget_seconds": float("nan")}, "cannot be below zero"),
        ({"log": 3}, "log is a int"),
        ({"probes": []}, "No probe is given"),
        ({"probes": HessianTrace}, "not the class HessianTrace"),
        ({"probes": ["hessian_trace"]}, "not 'hessian_trace'"),
        ({"probes": "hessian_trace"}, "not 'hessian_trace'"),
        ({"about": {"method": 3}}, "about= gives method=3"),
        ({"out": "file/below"}, "file' is a file"),
        ({"out": "trained", "overwrite": True}, "'trained' is a run of fpq-analyze train"),
    ],
)
def test_bad_arguments_are_refused_before_the_training(options, word, tmp_path):
    good = {"probes": HessianTrace(), "data": (torch.randn(8, 4), torch.randint(3, (8,))), "out": tmp_path / "live"}
    (tmp_path / "trained").mkdir()
    for name in ("file", "trained/run.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=word):
        CurvatureMonitor(**{**good, **options})
    assert not (tmp_path / "live").exists()
    with pytest.raises(UserError, match="finished epochs"):
        CurvatureMonitor(**good)(Unlucky("well"), 1.5)
    assert CurvatureMonitor(**good)(Unlucky("well"), np.int64(1))
