"""Watching a folder: whatever the writer does, the rows are those of one run over the files it leaves."""

from __future__ import annotations

import os
import shutil
import threading
import time
from importlib import import_module
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from fpq_analysis import ForeignRuns, HessianTrace, UserError, measure, watch
from fpq_analysis.cli import app
from tests.words import words

MODEL = {"n_data": 16, "device": "cpu", "model": "tests.nets:tiny"}
QUICK = {"interval": 0.05, "timeout": 1.0, **MODEL}
NUMBERS = ["epoch", "layer", "quantity", "value", "sem_data", "key"]


def same(ours, theirs):
    order = ["epoch", "layer", "quantity"]
    frames = [frame[NUMBERS].sort_values(order).reset_index(drop=True) for frame in (ours, theirs)]
    pd.testing.assert_frame_equal(*frames, rtol=1e-6)


def half(source, target):
    content = source.read_bytes()
    target.write_bytes(content[: len(content) // 2])


def test_a_writer_that_goes_backwards_writes_halves_and_is_killed(tiny_runs, tmp_path):
    run, whole = tmp_path / "runs" / "lsq", tiny_runs / "lsq-w4a4"
    run.mkdir(parents=True)
    for name in ("run.json", "manifest.json"):
        shutil.copy(whole / name, run)

    def write():
        half(whole / "epoch_0002.pt", run / "epoch_0002.pt")  # and is killed
        shutil.copy(whole / "epoch_0001.pt", run)
        time.sleep(1.0)  # long enough for what is there to be tried as often as it may be
        shutil.copy(whole / "epoch_0002.pt", run / "next.tmp")
        os.replace(run / "next.tmp", run / "epoch_0002.pt")
        half(whole / "epoch_0000.pt", run / "epoch_0000.pt")
        time.sleep(0.2)
        shutil.copy(whole / "epoch_0000.pt", run)

    writer = threading.Thread(target=write)
    writer.start()
    rounds = []
    found = watch(tmp_path / "runs", HessianTrace(), on_round=rounds.append, **QUICK | {"timeout": 3.0})
    writer.join()
    batch = shutil.copytree(whole, tmp_path / "batch" / "lsq")
    same(found, measure(batch.parent, HessianTrace(), **MODEL))
    assert len(rounds) >= 2  # the figures are drawn while files still come
    assert set(rounds[0]["epoch"]) < set(rounds[-1]["epoch"]) == {0, 1, 2}


def test_what_comes_while_a_round_takes_longer_than_the_timeout_is_measured(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "runs" / "fp")
    last = run / "epoch_0002.pt"
    last.unlink()

    def draw(frame):
        if not last.exists():
            time.sleep(0.2)
            shutil.copy(tiny_runs / "fp" / last.name, last)

    found = watch(tmp_path / "runs", HessianTrace(), on_round=draw, **QUICK | {"timeout": 0.1})
    assert set(found["epoch"]) == {0, 1, 2}


def test_a_file_that_never_becomes_whole_is_named_and_the_others_are_measured(tiny_runs, tmp_path):
    runs = tmp_path / "runs"
    run = shutil.copytree(tiny_runs / "fp", runs / "fp")
    half(tiny_runs / "fp" / "epoch_0001.pt", run / "epoch_0001.pt")
    faults = {}
    found = watch(runs, HessianTrace(), on_fault=faults.__setitem__, **QUICK)
    assert set(found["epoch"]) == {0, 2}
    assert list(faults) == [run / "epoch_0001.pt"]
    with pytest.raises(UserError, match="damaged"):
        watch(runs, HessianTrace(), **QUICK)


def test_a_file_is_whole_when_the_manifest_names_it_or_it_rests(tiny_runs, tmp_path):
    """Without a manifest a young file waits for the next look, of which `timeout=0` has none."""
    runs = tmp_path / "runs"
    run = shutil.copytree(tiny_runs / "fp", runs / "fp")
    (run / "manifest.json").unlink()
    (run / "epoch_0002.pt").touch()
    faults = {}
    once = QUICK | {"timeout": 0, "interval": 60.0}
    for name in ("epoch_0000.pt", "epoch_0001.pt"):
        os.utime(run / name, (0, 0))
    found = watch(runs, HessianTrace(), on_fault=faults.__setitem__, **once)
    assert set(found["epoch"]) == {0, 1}
    assert "still being written" in str(faults[run / "epoch_0002.pt"])


def test_a_fault_that_is_mended_elsewhere_is_none(tiny_runs, tmp_path, monkeypatch):
    """The file itself does not change: it is tried again all the same."""
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "runs" / "fp")
    about = (run / "run.json").read_text()
    (run / "run.json").write_text("{")

    def mend(seconds):
        (run / "run.json").write_text(about)

    clock = SimpleNamespace(sleep=mend, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(import_module("fpq_analysis.pipeline.watch"), "time", clock)
    found = watch(run.parent, HessianTrace(), **QUICK | {"timeout": 0.01})
    assert set(found["epoch"]) == {0, 1, 2}


def test_a_fault_of_a_whole_run_is_named_at_the_end(tiny_runs, tmp_path):
    """It was tried again without end."""
    state = torch.load(tiny_runs / "fp" / "epoch_0002.pt")["state_dict"]
    for name in ("good/epoch_1.pt", "twice/epoch_1.pt", "twice/best_epoch_1.pt"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, tmp_path / "runs" / name)
    faults = {}
    runs = ForeignRuns(tmp_path / "runs", "tests.nets:tiny", data="digits")
    options = {name: value for name, value in QUICK.items() if name != "model"}
    found = watch(runs, HessianTrace(), on_fault=faults.__setitem__, **options)
    assert set(found["run"]) == {"good"}
    assert list(faults) == [tmp_path / "runs" / "twice"]


def test_nothing_to_watch(tmp_path):
    with pytest.raises(UserError, match="to watch"):
        watch(tmp_path / "none", HessianTrace(), **QUICK)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No checkpoint in"):
        watch(tmp_path / "empty", HessianTrace(), **QUICK | {"timeout": 0})
    with pytest.raises(UserError, match="above zero"):
        watch(tmp_path / "empty", HessianTrace(), **QUICK | {"interval": 0})


WATCHED = ["--n-data", "16", "--device", "cpu", "--model", "tests.nets:tiny", "--interval", "0.05"]


def test_the_command_draws_and_ends_with_1_if_a_file_failed(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "runs" / "fp")
    half(tiny_runs / "fp" / "epoch_0001.pt", run / "epoch_0001.pt")
    options = [*WATCHED, "--timeout", "0.5"]
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "runs"), *options])
    assert result.exit_code == 1
    assert "epoch_0001.pt" in words(result.stderr)
    assert "Trace" in result.stdout
    assert (tmp_path / "figures" / "figure5.png").exists()
    assert (tmp_path / "report.html").exists()
    shutil.copy(tiny_runs / "fp" / "epoch_0001.pt", run)
    assert CliRunner().invoke(app, ["watch", str(tmp_path / "runs"), *options]).exit_code == 0
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "runs"), *options, "--probes", "hesian_trace"])
    assert "Did you mean" in words(result.stderr) or "did you mean" in words(result.stderr)


def test_the_command_says_why_nothing_could_be_measured_and_takes_a_definition(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "runs" / "fp", ignore=shutil.ignore_patterns("records"))
    for path in run.glob("epoch_*.pt"):
        half(path, path)
    options = [*WATCHED, "--timeout", "0"]
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "runs"), *options])
    assert result.exit_code == 1
    assert "Watching" in result.stderr
    assert "The same holds of 2 more files." in words(result.stderr)
    shutil.copytree(tiny_runs / "lsq-w4a4", tmp_path / "lsq", ignore=shutil.ignore_patterns("records"))
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "lsq"), *options, "--definition", "latent"])
    assert result.exit_code == 0, result.stderr
    assert "latent" in result.stdout
