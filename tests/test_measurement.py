"""Which checkpoints are measured, and what a probe is given there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch

from fpq_analysis import UserError, measure, records
from fpq_analysis.measurement import plan


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
    assert not plan(runs / "fp", probe, n_data=16).jobs
    manifest = runs / "fp" / "manifest.json"
    first = records.load(runs / "fp", "distance")["checkpoint"].iloc[0]
    assert first in manifest.read_text()
    (runs / "fp" / "epoch_0000.pt").unlink()
    assert not plan(runs / "fp", probe, n_data=16).jobs  # epoch 1 has nothing before it any more, epoch 2 is done
    shutil.copy(runs / "fp" / "epoch_0002.pt", runs / "fp" / "epoch_0000.pt")
    manifest.unlink()
    assert [job.path.name for job in plan(runs / "fp", probe, n_data=16).jobs] == ["epoch_0001.pt"]


def test_a_moved_teacher_is_found_and_a_lost_one_named(runs, tiny_runs):
    probe = Distance(("teacher",))
    lone = runs.parent / "elsewhere" / "lsq"
    lone.parent.mkdir()
    shutil.move(runs / "lsq-w4a4", lone)
    shutil.copytree(runs / "fp", lone.parent / "fp")
    assert len(measure(lone, probe, **MODEL)) == 6
    for run in (runs / "fp", lone.parent / "fp"):
        shutil.rmtree(run)
    if (tiny_runs / "fp").exists():  # where it was trained, and is looked for first
        assert not plan(lone, probe, n_data=16).faults
    text = (lone / "run.json").read_text()
    (lone / "run.json").write_text(text.replace(str(tiny_runs / "fp"), str(runs / "fp")))
    assert len(plan(lone, probe, n_data=16).faults) == 3
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
    assert [job.path.stem for job in plan(runs / "fp", Distance(), n_data=16, epochs="0,2,7").jobs] == ["epoch_0000"]
    with pytest.raises(UserError, match="epoch 7; their last is 2"):
        plan(runs, Distance(), epochs="7")
    with pytest.raises(UserError, match="no epochs"):
        plan(runs, Distance(), epochs="first")
