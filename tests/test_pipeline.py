"""Which checkpoints are measured, and what a probe is given there."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fpq_analysis import ForeignRuns, UserError, __version__, files, measure, records
from fpq_analysis.cli import app
from fpq_analysis.pipeline.plan import plan
from fpq_analysis.pipeline.run import run
from fpq_analysis.pipeline.task import Sampling
from tests.nets import tiny


@dataclass(frozen=True)
class Distance:
    """How far the last layer's weights are from those of the networks asked for."""

    needs: tuple[str, ...] = ()
    name = "distance"
    version = 1

    def __call__(self, point):
        ours = point.model.state_dict()["11.bias"]
        rows = [{"layer": "all", "quantity": "norm", "value": float(ours.norm()), "n_data": len(point.batches[0])}]
        for need in self.needs:
            if need != "quantizers":
                theirs = getattr(point, need).state_dict()["11.bias"]
                rows.append({"layer": "all", "quantity": need, "value": float((ours - theirs).norm())})
        return rows


SAMPLE = Sampling(16, device="cpu", model="tests.nets:tiny")
MODEL = {"n_data": 16, "device": "cpu", "model": "tests.nets:tiny"}


@pytest.fixture
def runs(tiny_runs, tmp_path):
    return shutil.copytree(tiny_runs, tmp_path / "runs")


def test_a_probe_gets_the_networks_it_needs(runs):
    frame = measure(runs, Distance(("teacher", "previous")), **MODEL)
    assert set(frame["run"]) == {"lsq-w4a4", "fpq-w4a4"}  # the float run has no teacher
    assert set(frame["epoch"]) == {1, 2}  # nothing is before epoch 0
    assert (frame.loc[frame["quantity"] != "norm", "value"] > 0).all()
    weights = [torch.load(runs / "fp" / f"epoch_000{i}.pt")["state_dict"]["11.bias"] for i in (1, 2)]
    steps = measure(runs / "fp", Distance(("previous",)), **MODEL)
    step = steps[(steps["epoch"] == 2) & (steps["quantity"] == "previous")]["value"].item()
    assert step == pytest.approx(float((weights[1] - weights[0]).norm()))


def test_only_quantized_networks(runs):
    assert set(measure(runs, Distance(("quantizers",)), **MODEL)["method"]) == {"lsq", "fpq"}


def test_another_network_beside_it_is_another_measurement(runs):
    probe = Distance(("previous",))
    measure(runs / "fp", probe, **MODEL)
    assert not plan(runs / "fp", probe, SAMPLE).measurements
    manifest = runs / "fp" / "manifest.json"
    first = records.load(runs / "fp", "distance")["checkpoint"].iloc[0]
    assert first in manifest.read_text()
    (runs / "fp" / "epoch_0000.pt").unlink()
    assert not plan(runs / "fp", probe, SAMPLE).measurements  # epoch 1 has nothing before it any more, epoch 2 is done
    shutil.copy(runs / "fp" / "epoch_0002.pt", runs / "fp" / "epoch_0000.pt")
    manifest.unlink()
    assert [job.path.name for job in plan(runs / "fp", probe, SAMPLE).measurements] == ["epoch_0001.pt"]


def test_a_moved_teacher_is_found_and_a_lost_one_named(runs, tiny_runs):
    probe = Distance(("teacher",))
    lone = runs.parent / "elsewhere" / "lsq"
    lone.parent.mkdir()
    shutil.move(runs / "lsq-w4a4", lone)
    shutil.copytree(runs / "fp", lone.parent / "fp")
    assert len(measure(lone, probe, **MODEL)) == 6
    for folder in (runs / "fp", lone.parent / "fp"):
        shutil.rmtree(folder)
    if (tiny_runs / "fp").exists():  # where it was trained, and is looked for first
        assert not plan(lone, probe, Sampling(16)).faults
    text = (lone / "run.json").read_text()
    (lone / "run.json").write_text(text.replace(str(tiny_runs / "fp"), str(runs / "fp")))
    assert len(plan(lone, probe, Sampling(16)).faults) == 3
    with pytest.raises(UserError, match="float network that .* started from is not in"):
        measure(lone, probe, **MODEL)


def test_records_alone_of_one_setting(runs):
    measure(runs, Distance(), **MODEL)
    measure(runs / "fp", Distance(), **{**MODEL, "n_data": 8})
    shutil.rmtree(runs / "fpq-w4a4")
    for path in runs.rglob("*.pt"):
        path.unlink()
    frame = records.load(runs, "distance")
    assert set(frame["run"]) == {"fp", "lsq-w4a4"}
    assert set(frame["n_data"]) == {16}  # most checkpoints
    assert set(records.load(runs / "fp", "distance")["n_data"]) == {8}  # as many of both: the newest
    assert records.load(runs, "nothing").empty


def test_some_epochs(runs):
    assert set(measure(runs, Distance(), epochs="last", **MODEL)["epoch"]) == {2}
    assert [job.path.stem for job in plan(runs / "fp", Distance(), SAMPLE, epochs="0,2,7").measurements] == [
        "epoch_0000"
    ]
    with pytest.raises(UserError, match="epoch 7; their last is 2"):
        plan(runs, Distance(), epochs="7")
    with pytest.raises(UserError, match="no epochs"):
        plan(runs, Distance(), epochs="first")


# ---- what a record is of

FACTORY = """
from torch import nn
from tests.nets import tiny

def make(num_classes=10, in_channels=1):
    net = tiny(num_classes, in_channels)
    net[2] = nn.{act}()
    return net
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """Write a module anew, as between two calls of the command; its factory's name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(act, name="own_factory"):
        (tmp_path / f"{name}.py").write_text(FACTORY.format(act=act))
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return f"{name}:make"

    yield write
    for name in ("own_factory", "another_factory"):
        sys.modules.pop(name, None)


@dataclass(frozen=True)
class Outputs:
    """Mean square of the logits."""

    needs = ()
    name = "outputs"
    version = 1

    def __call__(self, point):
        with torch.no_grad():
            value = float(point.model(point.batches[0]).square().mean())
        return [{"layer": "all", "quantity": "outputs", "value": value, "n_data": len(point.batches[0])}]


def test_another_factory_is_another_measurement(runs, factory):
    """The old value was served after the factory changed; --overwrite replaced that of another factory."""
    run, where = runs / "fp", {"n_data": 16, "device": "cpu", "epochs": "last"}

    def value(act, name="own_factory", **options):
        frame = measure(run, Outputs(), model=factory(act, name), **where, **options)
        return frame["value"].item()  # of the present factory alone

    relu, tanh = value("ReLU"), value("Tanh")
    assert abs(relu - tanh) > 1e-3
    assert value("Tanh", overwrite=True) == tanh
    assert not plan(run, Outputs(), Sampling(16, model=factory("ReLU")), epochs="last").measurements
    assert value("ReLU") == relu
    value("GELU", "another_factory")
    rows = files.read_jsonl(run / "records" / "outputs.jsonl")
    assert len({row["key"] for row in rows}) == 3
    assert {row["model"] for row in rows} == {"own_factory:make", "another_factory:make"}
    assert len({row["factory"] for row in rows}) == 3
    shown = records.load(run, "outputs")  # never two rows of one epoch
    assert list(shown["model"]) == ["another_factory:make"]


def test_a_factory_that_is_not_named_is_not_imported(runs, factory):
    measure(runs / "fp", Outputs(), **MODEL)
    assert len(plan(runs / "fp", Outputs(), Sampling(16)).measurements) == 3
    with pytest.raises(UserError, match="code named by a file is not run"):
        measure(runs / "fp", Outputs(), n_data=16, device="cpu")
    with pytest.raises(UserError, match="Cannot import the model"):
        plan(runs / "fp", Outputs(), Sampling(16, model="no_such:module"))


def test_foreign_factories_by_themselves(runs):
    folder = runs.parent / "own"
    folder.mkdir()
    torch.save(tiny().state_dict(), folder / "epoch_1.pt")

    def other(num_classes):
        return nn.Sequential(*tiny(num_classes), nn.Identity())

    found = {
        plan(ForeignRuns(folder, make, "digits"), Outputs()).measurements[0].key
        for make in (tiny, other, lambda: tiny())
    }
    found |= {plan(ForeignRuns(folder, partial(tiny, n), "digits"), Outputs()).measurements[0].key for n in (10, 11)}
    assert len(found) == 5


def test_rows_say_what_measured_them(runs):
    (row,) = measure(runs / "fp", Outputs(), epochs="last", **MODEL).to_dict("records")
    wanted = {"package": __version__, "torch": torch.__version__, "device": "cpu", "dtype": "float32"}
    assert {name: row[name] for name in wanted} == wanted
    assert wanted.keys() <= records.COLUMNS.keys()


def test_records_of_before_can_be_read_and_are_measured_once_more(runs):
    run = runs / "fp"
    frame = measure(run, Outputs(), **MODEL)
    file = run / "records" / "outputs.jsonl"
    new = ("package", "torch", "device", "dtype", "factory", "through")
    rows = [
        {k: v for k, v in row.items() if k not in new} | {"key": "0" + row["key"]} for row in files.read_jsonl(file)
    ]
    file.unlink()
    files.append_jsonl(file, rows)
    assert list(records.load(run, "outputs")["value"]) == list(frame["value"])
    assert len(plan(run, Outputs(), SAMPLE).measurements) == 3
    assert len(measure(run, Outputs(), **MODEL)) == 3
    assert list(records.load(run, "outputs")["epoch"]) == [0, 1, 2]
    assert records.load(run, "outputs")["package"].notna().all()


# ---- what stands in the files


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.uint8, torch.complex64])
def test_weights_that_are_no_floating_point_numbers(runs, kind):
    """Integer and bool weights were cast without a word."""
    path = runs / "fp" / "epoch_0002.pt"
    content = torch.load(path)
    content["state_dict"]["3.weight"] = (content["state_dict"]["3.weight"] * 100).to(kind)
    torch.save(content, path)
    (runs / "fp" / "manifest.json").unlink()
    faults = {}
    todo = plan(runs / "fp", Outputs(), SAMPLE)
    frame = run(todo, on_fault=faults.__setitem__)
    assert list(frame["epoch"]) == [0, 1]
    assert f"stores '3.weight' as {str(kind).removeprefix('torch.')}" in str(faults[path])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_said(runs, kind):
    """Measured as float32, and the row says so; before, as if the file held float32."""
    folder = runs.parent / "own"
    folder.mkdir()
    state = {key: t.to(kind) if t.is_floating_point() else t for key, t in tiny().state_dict().items()}
    torch.save(state, folder / "epoch_1.pt")
    source = ForeignRuns(folder, "tests.nets:tiny", "digits")
    (row,) = measure(source, Outputs(), n_data=16, device="cpu").to_dict("records")
    assert row["dtype"] == f"{str(kind).removeprefix('torch.')}, measured in float32"
    options = f"--ckpt-dir {folder} --model tests.nets:tiny --data digits --n-data 16 --figures {runs / 'figures'}"
    result = CliRunner().invoke(app, ["hessian", *options.split()])
    assert f"{str(kind).removeprefix('torch.')}, measured in float32" in " ".join(result.output.split())
