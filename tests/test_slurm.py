"""Slurm: the same rows as one process; jobs cancelled, put back, left by a killed parent. `make test-slurm` runs it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fpq_analysis import UserError, files, measure
from fpq_analysis.pipeline.engines.engine import open_engine
from fpq_analysis.pipeline.plan import plan
from fpq_analysis.pipeline.run import run
from tests.test_engines import SAMPLING, SCRIPT, WHERE, Deadly, assert_same, measured, runs, wanted  # noqa: F401
from tests.test_execution import NET, rows_in
from tests.words import words


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "fpq_analysis.pipeline.engines.slurm", raising=False)
    with pytest.raises(UserError, match=r"pip install 'fpq-analysis\[slurm\]'"):
        open_engine("slurm")


def slurm_answers():
    return shutil.which("sinfo") and subprocess.run(["sinfo", "-h"], capture_output=True, check=False).stdout.strip()


slurm = pytest.mark.slurm


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An engine of quick looks, with its folder."""
    pytest.importorskip("submitit")
    if not slurm_answers():
        pytest.skip("no Slurm answers")
    for name, seconds in {"PAUSE": 0.2, "QUEUE": 0.5, "GRACE": 1.0}.items():
        monkeypatch.setattr(f"fpq_analysis.pipeline.engines.slurm.{name}", seconds)
    return lambda address="per_job=4": open_engine(f"slurm:{address}", folder=tmp_path / "shared")


def jobs():
    asked = ["squeue", "--me", "-h", "-r", "-t", "R", "-o", "%i"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


def wait_for(what):
    while not (found := what()):
        time.sleep(0.1)
    return found


@slurm
def test_jobs_write_the_same_rows(runs, here, wanted, tmp_path):  # noqa: F811
    with here() as engine:
        assert_same(measured(runs, engine), wanted)
    assert not list((tmp_path / "shared" / ".slurm").glob("*.*"))


@slurm
def test_a_cancelled_job_loses_nothing(runs, here, tmp_path):  # noqa: F811
    notes = tmp_path / "notes"
    notes.mkdir()
    with here("per_job=6") as engine:
        todo = plan(runs, Deadly(str(notes), 0, 0.5), SAMPLING, epochs="1,2")
        futures = [engine.submit(run_one, task) for task in todo.tasks()]
        wait_for(lambda: futures[1].done())
        subprocess.run(["scancel", *jobs()], check=True)
        for future in futures:
            future.result(120)
    counts = sorted(len(note.read_text().split()) for note in notes.glob("*.*"))
    assert len(counts) == 6
    assert sum(counts) <= 7  # at most the one it was at was begun twice


def run_one(task):
    from fpq_analysis.pipeline.execute import execute

    return execute(task)


@slurm
def test_a_task_that_kills_every_job_is_a_fault_and_the_others_go_on(runs, here, tmp_path):  # noqa: F811
    notes = tmp_path / "notes"
    notes.mkdir()
    faults = {}
    with here() as engine:
        todo = plan(runs, Deadly(str(notes), 99), SAMPLING, epochs="1,2")
        frame = run(todo, executor=engine, on_fault=faults.__setitem__)
    assert len(frame) == 5
    assert re.search(r"Slurm job \d+_?\d* ended while it was at this", str(*faults.values()))


@slurm
def test_a_job_that_is_put_back_goes_on(runs, here, tmp_path):  # noqa: F811
    notes = tmp_path / "notes"
    notes.mkdir()
    with here("per_job=6") as engine:
        todo = plan(runs, Deadly(str(notes), 0, 0.5), SAMPLING, epochs="1,2")
        futures = [engine.submit(run_one, task) for task in todo.tasks()]
        wait_for(lambda: futures[1].done())
        subprocess.run(["scontrol", "requeue", *jobs()], check=True)
        subprocess.run(["scontrol", "update", f"JobId={wait_for(queued)[0]}", "StartTime=now"], check=True)
        for future in futures:
            future.result(200)
    assert sum(len(note.read_text().split()) for note in notes.glob("*.*")) <= 7


def queued():
    asked = ["squeue", "--me", "-h", "-r", "-t", "PD", "-o", "%i"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


@slurm
def test_jobs_of_a_killed_parent_are_collected_by_the_next(runs, here, tmp_path):  # noqa: F811
    notes, script = tmp_path / "notes", tmp_path / "script.py"
    notes.mkdir()
    script.write_text(SCRIPT.replace("jobs=2", "executor='slurm:per_job=9'"))
    parent = subprocess.Popen([sys.executable, script, runs, notes])
    wait_for(lambda: parent.poll() is not None or list(notes.iterdir()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    before = jobs()
    measure(runs, Deadly(str(notes), 0, 0.5), executor="slurm:per_job=9", **WHERE)
    assert len(before) == 1
    assert len(rows_in(runs)) == 9
    assert sum(len(files.read_jsonl(path)) for path in runs.rglob("records/*.jsonl")) == 9
    assert sum(len(note.read_text().split()) for note in notes.glob("*.*")) == 9  # each once


@slurm
def test_what_would_be_submitted_is_printed_with_its_forecast(runs, here):  # noqa: F811
    command = [sys.executable, "-m", "fpq_analysis", "hessian", "--ckpt-dir", runs, "--model", NET, "--n-data", "16"]
    command += ["--epochs", "1,2", "--device", "cpu", "--dry-run", "--executor", "slurm:per_job=4,timeout_min=7"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "an array of 2 Slurm jobs of up to 4 checkpoints" in words(result.stdout)
    assert "timeout_min=7" in result.stdout
    assert not jobs()


@slurm
def test_what_slurm_does_not_take_is_said(here):
    for address, message in {
        "partitoin=gpu": "partitoin",
        "gpu": "no KEY=VALUE",
        "per_job=0": "no number of checkpoints",
    }.items():
        with pytest.raises(UserError, match=message):
            here(address)
    with here("partition=nowhere") as engine, pytest.raises(UserError, match="nowhere|partition"):
        engine.submit(abs, -1).result(60)
