"""Dask: the same rows as one process, and what happens when workers, the scheduler or the parent are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fpq_analysis import UserError, measure
from fpq_analysis.pipeline.engines.engine import open_engine
from fpq_analysis.pipeline.plan import plan
from fpq_analysis.pipeline.run import run
from tests.test_engines import SAMPLING, SCRIPT, WHERE, Deadly, assert_same, measured, runs, wanted  # noqa: F401
from tests.test_execution import rows_in


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "fpq_analysis.pipeline.engines.dask", raising=False)
    with pytest.raises(UserError, match=r"pip install 'fpq-analysis\[dask\]'"):
        open_engine("dask://local")


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("distributed")
    with open_engine("dask://local", 2) as engine:
        yield engine


def test_workers_write_the_same_rows(runs, engine, wanted):  # noqa: F811
    assert "2 workers" in engine.about
    assert_same(measured(runs, engine), wanted)


def test_a_task_whose_worker_was_killed_is_done_by_another(runs, tmp_path, engine):  # noqa: F811
    notes = tmp_path / "notes"
    notes.mkdir()
    frame = run(plan(runs, Deadly(str(notes)), SAMPLING, epochs="1,2"), executor=engine)
    assert len(frame) == len(frame["key"].unique()) == 6
    assert sorted(len(note.read_text().split()) for note in notes.glob("*.*")) == [1] * 5 + [2]


def test_a_task_that_kills_every_worker_is_a_fault(runs, tmp_path, engine):  # noqa: F811
    notes = tmp_path / "notes"
    notes.mkdir()
    faults = {}
    todo = plan(runs, Deadly(str(notes), 99), SAMPLING, epochs="1,2")
    frame = run(todo, executor=engine, on_fault=faults.__setitem__)
    assert len(frame) == 5
    assert "Dask worker" in str(*faults.values())


def test_a_killed_parent_loses_nothing(runs, tmp_path, engine):  # noqa: F811
    notes, script = tmp_path / "notes", tmp_path / "script.py"
    notes.mkdir()
    script.write_text(SCRIPT.replace("jobs=2", "jobs=2, executor='dask://local'"))
    parent = subprocess.Popen([sys.executable, script, runs, notes], start_new_session=True)
    while not rows_in(runs) and parent.poll() is None:
        time.sleep(0.05)
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    before = rows_in(runs)
    assert 0 < len(before) < 9
    measure(runs, Deadly(str(notes), 0, 0.5), executor=engine, **WHERE)
    after = rows_in(runs)
    assert len(after) == 9
    assert before.items() <= after.items()


def test_a_scheduler_elsewhere_is_found_and_lost(tmp_path):
    pytest.importorskip("distributed")
    file = tmp_path / "scheduler.json"
    start = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port=0", "--no-dashboard"]
    scheduler = subprocess.Popen([*start, "--scheduler-file", file], stderr=subprocess.DEVNULL)
    worker = None
    try:
        while not file.exists():
            time.sleep(0.05)
        port = str(file.read_text()).split("tcp://")[1].split('"')[0]
        start = [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://{port}", "--no-nanny", "--no-dashboard"]
        worker = subprocess.Popen([*start, "--resources", "GPU=1", "--nthreads=2"], stderr=subprocess.DEVNULL)
        with open_engine(f"dask://{port}?GPU=1") as engine:
            assert engine.submit(os.getpid).result(60) == worker.pid
            assert "Dask" in engine.outlook(8, 60.0)
            hangs = engine.submit(time.sleep, 600)
            scheduler.kill()
            worker.kill()
            with pytest.raises(UserError, match="the Dask scheduler has ended"):
                hangs.result(60)
    finally:
        for process in (scheduler, worker):
            if process is not None:
                process.kill()
                process.wait()


def test_addresses_are_checked():
    pytest.importorskip("distributed")
    for given, message in {
        ("dask", 1): "dask://HOST:PORT",
        ("dask://h:1?GPU", 1): "NAME=AMOUNT",
        ("dask://localhost:1", 2): "is the cluster's",
    }.items():
        with pytest.raises(UserError, match=message):
            open_engine(*given)


def test_a_scheduler_that_does_not_answer_is_said(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("fpq_analysis.pipeline.engines.dask.PATIENCE", 0.5)
    with pytest.raises(UserError, match="No Dask scheduler answers"):
        open_engine("dask://127.0.0.1:9")


def test_an_address_without_a_port_is_told_before_there_is_a_client(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("fpq_analysis.pipeline.engines.dask.Client", None)
    with pytest.raises(UserError, match="missing port number"):
        open_engine("dask://x")
