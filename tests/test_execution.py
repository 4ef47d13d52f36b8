"""The same records, however the work is cut up: by processes, threads, shards, and kills at any moment."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from fpq_analysis import ForeignRuns, UserError, files, measure
from fpq_analysis.cli import app
from fpq_analysis.pipeline import store
from fpq_analysis.pipeline.execute import execute, forget
from fpq_analysis.pipeline.forecast import forecast
from fpq_analysis.pipeline.plan import plan
from fpq_analysis.pipeline.run import run
from fpq_analysis.pipeline.task import Sampling
from fpq_analysis.probes import PROBES, HessianEigs, HessianTrace, NoiseResponse
from fpq_analysis.probes.landscape import LandscapeSettings
from tests.nets import tiny
from tests.words import words

NET = "tests.nets:tiny"
SAMPLING = Sampling(16, device="cpu", model=NET)
WHERE = {"n_data": 16, "device": "cpu", "model": NET}
PLANES = [LandscapeSettings("pca", "float", points=4), LandscapeSettings("hessian", dim=1, points=3)]
EVERY = [*(kind() for name, kind in PROBES.items() if name != "noise"), NoiseResponse((1.0,), 2), *PLANES]
SPAWN = multiprocessing.get_context("spawn")
SERVER = multiprocessing.get_context("forkserver")  # children start at once: torch is loaded there already


@pytest.fixture
def runs(tiny_runs, tmp_path):
    return shutil.copytree(tiny_runs, tmp_path / "runs")


def of(probe):
    """Landscapes are of the last epochs: a trajectory needs some before."""
    return {**WHERE, "epochs": "last" if isinstance(probe, LandscapeSettings) else "1,2"}


def rows_in(folder):
    """Every row on disk by run, key, layer and quantity, without what may differ: times, and how many were written at
    once.
    """
    found = {}
    for path in sorted(folder.rglob("records/*.jsonl")):
        for row in files.read_jsonl(path):
            about = path.parent.parent.name, row["probe"], row["key"], row["layer"], row["quantity"]
            found[about] = {name: value for name, value in row.items() if name not in ("seconds", "last")}
    return found


@pytest.mark.parametrize("probe", EVERY, ids=lambda probe: probe.name)
def test_a_task_is_all_that_is_needed(tiny_runs, probe):
    task = list(plan(tiny_runs, probe, SAMPLING, epochs="last", overwrite=True).tasks())[-1]
    copy = pickle.loads(pickle.dumps(task))
    assert copy == task
    found = []
    for one in (task, copy):
        forget()
        found.append([{**row, "seconds": 0} for row in execute(one).rows])
    assert repr(found[0]) == repr(found[1])


def test_processes_and_threads_write_what_one_by_one_does(tiny_runs, tmp_path):
    probes = (HessianTrace(), HessianEigs(k=2), *PLANES)
    with ProcessPoolExecutor(2, SPAWN) as processes, ThreadPoolExecutor(2) as threads:
        folders = []
        for name, executor in {"serial": None, "processes": processes, "threads": threads}.items():
            folders.append(shutil.copytree(tiny_runs, tmp_path / name))
            frames = [measure(folders[-1], probe, executor=executor, **of(probe)) for probe in probes]
            assert all(len(frame) for frame in frames)
    serial, *others = map(rows_in, folders)
    assert all(rows == serial for rows in others)


def test_what_other_processes_cannot_be_handed_is_said(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "epoch_1.pt")
    source = ForeignRuns(tmp_path, lambda: tiny(), "digits")
    with ProcessPoolExecutor(1, SPAWN) as pool, pytest.raises(UserError, match="must be importable there"):
        measure(source, HessianTrace(), n_data=16, device="cpu", executor=pool)


def measure_all(folder):
    store.FLUSH = 0.0
    torch.set_num_threads(1)
    for probe in (HessianTrace(), HessianEigs(k=1), LandscapeSettings("pca", points=5)):
        measure(folder, probe, **of(probe))


def test_a_run_killed_at_any_moment_resumes_to_the_same_records(tiny_runs, tmp_path):
    """SIGKILL, again and again, with records written as often as can be."""
    SERVER.set_forkserver_preload([__name__])
    whole, killed = (shutil.copytree(tiny_runs, tmp_path / name) for name in ("whole", "killed"))
    start = time.monotonic()
    measure_all(whole)
    takes = time.monotonic() - start
    dice = random.Random(0)
    for _ in range(6):
        process = SERVER.Process(target=measure_all, args=(killed,))
        process.start()
        while not list(killed.rglob("records/*.jsonl")) and process.is_alive():
            time.sleep(0.01)
        process.join(dice.uniform(0.0, 0.2) * takes)
        process.kill()
        process.join()
    for path in killed.rglob("records/*.jsonl"):  # and what was being written is torn
        path.write_bytes(path.read_bytes()[:-40])
    measure_all(killed)
    assert rows_in(killed) == rows_in(whole)


def test_shards_of_other_directions_are_not_put_together(runs, tmp_path):
    probe = LandscapeSettings(points=3)
    elsewhere, where = shutil.copytree(runs, tmp_path / "elsewhere"), of(probe)
    measure(elsewhere / "fp", probe, shard=(1, 2), **where)
    measure(runs / "fp", probe, shard=(2, 2), **where)
    (path,) = elsewhere.rglob("landscape.1of2.jsonl")
    rows = files.read_jsonl(path)
    sign = {"signature_1": -1, "signature_2": -1}
    rows = [{**row, "value": row["value"] * sign.get(row["quantity"], 1)} for row in rows]
    files.append_jsonl(runs / "fp" / "records" / path.name, rows)
    with pytest.raises(UserError, match="come out otherwise"):
        measure(runs / "fp", probe, **where)
    frame = measure(runs / "fp", probe, overwrite=True, **where)
    assert frame["quantity"].str.startswith("rise_").sum() == 9
    assert not list(runs.rglob("*of2*"))
    for i in (1, 2):  # shards that measured all of it again
        measure(runs / "fp", probe, shard=(i, 2), overwrite=True, **where)
    assert len(measure(runs / "fp", probe, **where)) == len(frame)


COMMANDS = {
    "hessian": ["--top-k", 2, "--density", "--sharpness"],
    "gradnorm": [],
    "variance": [],
    "features": [],
    "drift": [],
    "noise": ["--n-draws", 2, "--sizes", 1],
    "oscillation": [],
    "landscape": ["--points", 3],
}


def call(command, *arguments, code=0):
    result = CliRunner().invoke(app, [command, *map(str, arguments)], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return words(result.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_shards_add_up(command, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("fpq_analysis.cli.measuring.draw", lambda *arguments: [])
    shutil.rmtree(runs / "fpq-w4a4")
    options = ["--model", NET, "--device", "cpu", *COMMANDS[command]]
    options += [] if command == "landscape" else ["--epochs", "1,2"]
    options += [] if command == "oscillation" else ["--n-data", 16]
    whole = shutil.copytree(runs, tmp_path / "whole")
    call(command, "--ckpt-dir", whole, *options)
    for part in ("2/2", "1/2"):
        text = call(command, "--ckpt-dir", runs, *options, "--shard", part)
        assert f"Part {part} is done" in text
        assert " 0 done" in text
        assert rows_in(runs).keys() < rows_in(whole).keys() or part == "1/2"
    text = call(command, "--ckpt-dir", runs, *options)
    assert text.count(" 0 to do") == text.count("to do")
    assert rows_in(runs) == rows_in(whole)
    names = {path.name for path in runs.rglob("records/*.jsonl")}
    assert names == {path.name for path in whole.rglob("records/*.jsonl")}  # none of shards


def test_shards_that_measured_again_replace_what_was_there(runs):
    first = measure(runs, HessianTrace(), **WHERE)
    for path in runs.rglob("records/*.jsonl"):
        path.write_text(path.read_text().replace('"value": ', '"value": 7'))
    for i in (1, 2, 3):
        measure(runs, HessianTrace(), overwrite=True, shard=(i, 3), **WHERE)
    again = measure(runs, HessianTrace(), **WHERE)
    assert list(again["value"]) == list(first["value"])


@dataclass(frozen=True)
class Steps:
    """Ten pieces, of which one fails."""

    fails: int = 10
    name = "steps"
    version = 1
    needs = ()
    notes = ()

    def pieces(self, n_others):
        return [f"step_{k}" for k in range(10)]

    def begin(self, point):
        return self

    def measure(self, piece):
        if piece == f"step_{self.fails}":
            raise ZeroDivisionError("oops")
        return [{"layer": "all", "quantity": piece, "value": 1.0}]

    def __call__(self, point):
        raise NotImplementedError


def test_a_piece_that_fails_ends_its_measurement_alone(runs):
    faults = {}
    frame = run(
        plan(runs / "fp", Steps(3), SAMPLING, epochs="1,2"), on_fault=lambda p, f: faults.setdefault(p, []).append(f)
    )
    assert [len(found) for found in faults.values()] == [1, 1]
    assert all("oops" in str(fault) and path.name in str(fault) for path, (fault,) in faults.items())
    assert list(frame["quantity"]) == 2 * ["step_0", "step_1", "step_2"]  # kept
    with pytest.raises(UserError, match="oops"):
        measure(runs / "fp", Steps(3), **WHERE)
    assert plan(runs / "fp", Steps(), SAMPLING).n_left == 30
    assert len(measure(runs / "fp", Steps(), shard=(2, 4), **WHERE)) == 8


def test_pieces_are_dealt_out_in_turn(tiny_runs):
    plans = [plan(tiny_runs, Steps(), SAMPLING, shard=(i, 4)) for i in (1, 2, 3, 4)]
    assert [found.n_left for found in plans] == [23, 23, 22, 22]
    dealt = [(task.measurement.path, task.piece) for found in plans for task in found.tasks()]
    assert sorted(dealt) == sorted((t.measurement.path, t.piece) for t in plan(tiny_runs, Steps(), SAMPLING).tasks())


def test_a_forecast_goes_on_after_a_bad_checkpoint(runs, tmp_path):
    """The first one ended it."""
    for name in ("epoch_0000.pt", "epoch_0001.pt"):
        content = torch.load(runs / "fp" / name)
        content["state_dict"]["3.weight"].fill_(torch.nan)
        torch.save(content, runs / "fp" / name)
    (runs / "fp" / "manifest.json").unlink()
    faults = {}
    frame = forecast(plan(runs, HessianTrace(), SAMPLING), faults.__setitem__)
    assert list(frame["to do"]) == [3, 3, 3]
    assert [path.name for path in faults] == ["epoch_0000.pt", "epoch_0001.pt"]
    (runs / "fp" / "epoch_0002.pt").unlink()
    text = call("hessian", "--ckpt-dir", runs, "--model", NET, "--device", "cpu", "--dry-run", code=1)
    assert text.count("NaN") == 1  # one paragraph
