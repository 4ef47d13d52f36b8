"""What is known of a run without reading weights: hashes that are taken again only where a file changed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpq_analysis import ForeignRuns, UserError, files, measure, records
from fpq_analysis.pipeline.plan import plan
from fpq_analysis.pipeline.task import Sampling
from fpq_analysis.runs import OwnRuns, Run, file_hash, stamps
from fpq_analysis.training import TrainConfig
from tests.nets import DIGITS, tiny

NET = "tests.nets:tiny"


@dataclass(frozen=True)
class Norm:
    """The norm of one bias."""

    name = "norm"
    version = 1
    needs = ()

    def __call__(self, point):
        value = float(point.model.state_dict()["11.bias"].norm())
        return [{"layer": "all", "quantity": "norm", "value": value, "n_data": len(point.batches[0])}]


MODEL = {"n_data": 16, "device": "cpu", "model": NET}


@pytest.fixture
def no_reading(monkeypatch):
    """A function after whose call no file may be hashed, nor weights be read."""

    def forbid():
        def refuse(*args, **kwargs):
            raise AssertionError("a file was read")

        monkeypatch.setattr(stamps, "sha256", refuse)
        monkeypatch.setattr(torch, "load", refuse)

    return forbid


def settle(folder):
    """Let the files be a minute old, and the manifests know it not."""
    for number, path in enumerate(sorted(folder.rglob("*.p*t*"))):
        os.utime(path, (1_000_000_000 + number, 1_000_000_000 + number))


def keys(folder, **options):
    todo = plan(folder, Norm(), Sampling(16), **options)
    return {job.path.name: job.key for job in todo.measurements}, [path.name for path, _ in todo.faults]


def test_planning_reads_no_weights(tiny_runs, tmp_path, no_reading):
    folder = shutil.copytree(tiny_runs, tmp_path / "runs")  # times as they were
    no_reading()
    assert len(plan(folder, Norm(), Sampling(16)).measurements) == 9


def test_two_hundred_large_checkpoints(tmp_path, no_reading):
    """Files of 45 MB that take no room: nothing that grows with them is done."""
    about = {"config": asdict(TrainConfig(model="resnet18")), "data": DIGITS}
    known = {}
    for epoch in range(200):
        path = tmp_path / f"epoch_{epoch:04d}.pt"
        with path.open("wb") as file:
            file.truncate(45_000_000)
        known[path.name] = stamps.Stamp(f"{epoch:064x}", 45_000_000, path.stat().st_mtime_ns)
    (tmp_path / "run.json").write_text(json.dumps(about))
    stamps.write_stamps(tmp_path / "manifest.json", known)
    no_reading()
    assert len(plan(tmp_path, Norm(), Sampling(16)).measurements) == 200


def test_a_copy_without_its_times_is_hashed_once(tiny_runs, tmp_path, no_reading):
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "fp")
    before = keys(run)
    settle(run)
    assert keys(run) == before
    assert set(json.loads((run / "records" / "files.json").read_text())) == {
        p.name for p in Run(run).checkpoints.values()
    }
    no_reading()
    assert keys(run) == before


def test_manifests_of_before_sizes_and_times(tiny_runs, tmp_path, no_reading):
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "fp")
    before = keys(run)
    (run / "manifest.json").write_text(json.dumps(Run(run).manifest))
    settle(run)
    assert keys(run) == before
    no_reading()
    assert keys(run) == before


def test_young_files_are_not_remembered(tiny_runs, tmp_path):
    """On a disk that keeps times in steps of two seconds, they may change once more without one."""
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "fp")
    (run / "manifest.json").unlink()
    for path in Run(run).checkpoints.values():
        path.touch()
    keys(run)
    assert not (run / "records" / "files.json").exists()


def test_a_folder_that_cannot_be_written_to(tiny_runs, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "fp")
    before = keys(run)
    settle(run)

    def full(*args):
        raise OSError("read-only")

    monkeypatch.setattr(stamps, "write_stamps", full)
    assert keys(run) == before


def test_a_changed_file_is_a_fault_of_its_own(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "fp")
    path = run / "epoch_0001.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found, faults = keys(run)
    assert set(found) == {"epoch_0000.pt", "epoch_0002.pt"}
    assert faults == ["epoch_0001.pt"]


@pytest.mark.parametrize("vouched", [True, False])
def test_a_copy_under_another_epoch_is_named(tiny_runs, tmp_path, vouched):
    """Before, there were two rows of one epoch."""
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "fp")
    shutil.copy(run / "epoch_0002.pt", run / "epoch_0000.pt")
    if not vouched:
        (run / "manifest.json").unlink()
    faults = {}
    rows = measure(run, Norm(), n_data=16, device="cpu", model=NET, on_fault=faults.__setitem__)
    assert sorted(rows["epoch"]) == [1, 2]
    (fault,) = faults.values()
    assert "epoch_0000.pt" in str(fault)
    if not vouched:
        assert "is of epoch 2, by what it holds, and of epoch 0 by its name" in str(fault)


def test_without_run_json_the_files_speak(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs / "lsq-w4a4", tmp_path / "lsq")
    before = keys(run)
    said = OwnRuns().header(run / "epoch_0002.pt")
    (run / "run.json").unlink()
    assert keys(run) == before
    assert OwnRuns().header(run / "epoch_0002.pt") == said
    (run / "run.json").write_text('{"config": null}')
    ((path, fault), *_) = plan(run, Norm(), Sampling(16)).faults
    assert path.name == "epoch_0000.pt"
    assert "run.json' is damaged" in str(fault)
    assert "'config' is None" in str(fault)


def test_a_run_json_of_another_run_is_noticed(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs / "lsq-w4a4", tmp_path / "lsq")
    shutil.copy(tiny_runs / "fp" / "run.json", run)
    with pytest.raises(UserError, match=r"run\.json beside it is of another run"):
        measure(run, Norm(), **MODEL)


def test_files_of_another_program_are_read_once(tmp_path, no_reading):
    folder = tmp_path / "own"
    folder.mkdir()
    for epoch in range(3):
        torch.save(tiny().state_dict(), folder / f"epoch_{epoch}.pth")
    settle(folder)
    source = ForeignRuns(folder, NET, "digits")
    before = keys(source)
    no_reading()
    assert keys(source) == before
    os.utime(folder / "epoch_1.pth")
    assert keys(source)[1] == ["epoch_1.pth"]


@given(st.data())
@settings(max_examples=40)
def test_keys_are_those_of_epoch_and_content(tiny_runs, tmp_path_factory, data):
    """Whatever is touched, copied, renamed or written over: a file has the key of its content and epoch, or none."""
    run = shutil.copytree(tiny_runs / "fp", tmp_path_factory.mktemp("any") / "fp")
    if data.draw(st.booleans(), label="without a manifest"):
        (run / "manifest.json").unlink()
    truth, _ = keys(run)
    contents = {name: (run / name).read_bytes() for name in truth}
    for step in range(data.draw(st.integers(1, 4))):
        name, other = (data.draw(st.sampled_from(sorted(contents))) for _ in range(2))
        what = data.draw(st.sampled_from(["touch", "rewrite", "copy", "copy with time", "swap", "plan"]))
        if what == "touch":
            os.utime(run / name, (10**9 + step,) * 2)
        elif what == "rewrite" and (run / name).exists():
            content = (run / name).read_bytes()
            (run / name).write_bytes(content)
        elif what in ("copy", "copy with time") and name != other:
            (shutil.copy if what == "copy" else shutil.copy2)(run / name, run / other)
        elif what == "swap" and name != other:
            (run / name).rename(run / "kept")
            (run / other).rename(run / name)
            (run / "kept").rename(run / other)
        else:
            keys(run)
    found, faults = keys(run)
    for name, content in contents.items():
        if (run / name).read_bytes() == content:
            assert found[name] == truth[name]
        else:
            assert name in faults or found[name] not in truth.values()
    sums = {name: files.sha256(run / name) for name in found}
    assert {name: file_hash(run / name) for name in found} == sums
    assert not records.done(run, "norm")


def test_a_run_reads_when_it_is_asked(tiny_runs, tmp_path):
    run = Run(tiny_runs / "lsq-w4a4", "study/lsq")
    assert (run.method, run.bits, run.seed, run.group[0]) == ("lsq", "W4A4", 0, "study")
    assert run.finished
    assert not run.stopped
    assert run.last_epoch == max(run.checkpoints)
    assert run.teacher is not None
    assert file_hash(run.teacher) == run.teacher_sha256
    assert run.newest_sha256 == file_hash(run.checkpoints[run.last_epoch])
    nothing = Run(tmp_path / "nowhere")
    assert (nothing.checkpoints, nothing.rows, nothing.manifest) == ({}, [], {})
    with pytest.raises(UserError, match="is not a run"):
        _ = nothing.config
    foreign = Run(tmp_path, described={"config": {"method": "qat", "bits": None, "seed": "unknown"}, "data": {}})
    assert (foreign.method, foreign.bits, foreign.seed, foreign.teacher, foreign.finished) == (
        "qat", "FP", None, None, False)  # fmt: skip
