"""Engines: the same rows from every one of them, and nothing lost or double when processes die."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from fpq_analysis import ForeignRuns, UserError, files, measure
from fpq_analysis.cli import app
from fpq_analysis.errors import UnfitError
from fpq_analysis.pipeline import execute
from fpq_analysis.pipeline.engines.engine import Engine, Resources, open_engine
from fpq_analysis.pipeline.engines.processes import ProcessEngine
from fpq_analysis.pipeline.plan import plan
from fpq_analysis.pipeline.run import run
from fpq_analysis.pipeline.task import Sampling
from fpq_analysis.probes import Drift, HessianEigs, HessianTrace
from fpq_analysis.probes.landscape import LandscapeSettings
from fpq_analysis.training import read_sweep, run_sweep
from fpq_analysis.training.sweep import DONE, FAILED
from tests.nets import tiny
from tests.test_execution import NET, WHERE, call, of, rows_in
from tests.test_sweeps import STUDY

SAMPLING = Sampling(16, device="cpu", model=NET)
# The exact trace, an estimate with seeds, the teacher's network, and a measurement made of pieces.
PROBES = (HessianTrace(), HessianEigs(k=2), Drift(), LandscapeSettings("hessian", dim=1, points=5))


@pytest.fixture
def runs(tiny_runs, tmp_path):
    return shutil.copytree(tiny_runs, tmp_path / "runs")


@pytest.fixture(scope="module")
def engine():
    with ProcessEngine(2, "cpu") as engine:
        yield engine


def measured(folder, engine):
    for probe in PROBES:
        assert len(measure(folder, probe, executor=engine, **of(probe)))
    return rows_in(folder)


def assert_same(found, wanted):
    """Seeds, keys and all else alike, and values to 1e-6."""
    assert found.keys() == wanted.keys()
    for about, row in wanted.items():
        assert found[about].keys() == row.keys()
        for name, value in row.items():
            exact = not isinstance(value, float)
            assert found[about][name] == (value if exact else pytest.approx(value, rel=1e-6, nan_ok=True)), about


@pytest.fixture(scope="module")
def wanted(tiny_runs, tmp_path_factory):
    return measured(shutil.copytree(tiny_runs, tmp_path_factory.mktemp("serial") / "runs"), None)


def test_processes_write_the_same_rows(runs, tiny_runs, tmp_path, engine, wanted):
    assert_same(measured(runs, engine), wanted)
    four = shutil.copytree(tiny_runs, tmp_path / "four")
    measure(four, HessianTrace(), jobs=4, **of(HessianTrace()))
    assert_same(rows_in(four), {about: row for about, row in wanted.items() if about[1] == "hessian_trace"})


@dataclass(frozen=True)
class Loads:
    """How often this process has seen these very tensors of the data, and of the teacher's file."""

    name = "loads"
    version = 1
    needs = ("teacher",)

    def __call__(self, point):
        _, teacher = execute._kept.beside["teacher"]
        tensors = {"data": point.batches[1], "teacher": next(iter(teacher.state_dict.values()))}
        for tensor in tensors.values():
            tensor.seen = getattr(tensor, "seen", 0) + 1
        common = {"layer": str(os.getpid())}
        return [{**common, "quantity": name, "value": float(tensor.seen)} for name, tensor in tensors.items()]


def test_a_process_loads_the_data_and_the_teacher_once(runs, engine):
    """And keeps them from task to task."""
    frame = run(plan(runs, Loads(), SAMPLING, epochs="0,1,2"), executor=engine)
    for name in ("data", "teacher"):
        seen = frame[frame["quantity"] == name].groupby("layer")["value"].apply(sorted)
        assert seen.map(len).sum() == 6
        assert all(times == list(range(1, len(times) + 1)) for times in seen)


@dataclass(frozen=True)
class Deadly:
    """Kills its process at one epoch so many times, and is slow."""

    folder: str
    times: int = 1
    seconds: float = 0.0
    name = "deadly"
    version = 1
    needs = ()

    def __call__(self, point):
        time.sleep(self.seconds)
        value = point.model[0].weight.sum().item()
        note, victim = (Path(self.folder, name) for name in (f"{value}", "victim"))
        with note.open("a") as file:  # a line each time that it was begun
            file.write(f"{os.getpid()}\n")
        with contextlib.suppress(FileExistsError), victim.open("x") as file:
            file.write(note.name)
        if victim.read_text() == note.name and len(note.read_text().split()) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"layer": "all", "quantity": "sum", "value": value}]


def test_a_task_whose_process_was_killed_is_done_by_another(runs, tmp_path, engine):
    notes = tmp_path / "notes"
    notes.mkdir()
    frame = run(plan(runs, Deadly(str(notes)), SAMPLING, epochs="1,2"), executor=engine)
    assert len(frame) == len(frame["key"].unique()) == 6
    assert sorted(len(note.read_text().split()) for note in notes.glob("*.*")) == [1] * 5 + [2]


def test_a_task_that_kills_every_process_is_a_fault_and_the_others_go_on(runs, tmp_path, engine):
    notes = tmp_path / "notes"
    notes.mkdir()
    faults = {}
    frame = run(
        plan(runs, Deadly(str(notes), 99), SAMPLING, epochs="1,2"), executor=engine, on_fault=faults.__setitem__
    )
    assert len(frame) == 5
    ((path, fault),) = faults.items()
    assert "ended without a word" in str(fault)
    assert "memory runs out" in str(fault)
    assert path.suffix == ".pt"


# What is started in a shell's background has interrupts switched off.
SCRIPT = """
import signal, sys
from fpq_analysis import measure
from tests.test_engines import Deadly, WHERE
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    measure(sys.argv[1], Deadly(sys.argv[2], 0, 0.5), jobs=2, **WHERE)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_ends_takes_its_processes_along_and_loses_nothing(how, runs, tmp_path, engine):
    notes, script = tmp_path / "notes", tmp_path / "script.py"
    notes.mkdir()
    script.write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, script, runs, notes], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while not rows_in(runs) and parent.poll() is None:
        time.sleep(0.05)
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal does
    else:
        parent.send_signal(how)
    said = parent.communicate(timeout=60)[1]
    assert said.count("Traceback") == (how == signal.SIGINT)  # the parent's own
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    before = rows_in(runs)
    assert 0 < len(before) < 9
    measure(runs, Deadly(str(notes), 0), executor=engine, **WHERE)
    after = rows_in(runs)  # of other settings, so all anew
    measure(runs, Deadly(str(notes), 0, 0.5), executor=engine, **WHERE)
    whole = rows_in(runs)
    assert len(whole) == len(after) - len(before) + 9
    assert before.items() <= whole.items()
    assert sum(len(files.read_jsonl(path)) for path in runs.rglob("records/*.jsonl")) == len(whole)


def fail_to(what):
    if what == "unpickle":
        raise UntoldError("a", "b")
    raise UnfitError("It is so.", "Do that.")


class UntoldError(Exception):
    """Its arguments are not those it was made with."""

    def __init__(self, a, b):
        super().__init__(a)


def test_errors_come_back(engine):
    with pytest.raises(UnfitError, match=r"It is so\. Do that\.") as caught:
        engine.submit(fail_to, "say").result()
    assert caught.value.cure == "Do that."
    with pytest.raises(RuntimeError, match="UntoldError: a"):
        engine.submit(fail_to, "unpickle").result()
    with pytest.raises(Exception, match="pickle"):
        engine.submit(lambda: 1).result()
    assert engine.submit(abs, -2).result() == 2


def test_cores_are_divided(engine):
    assert engine.submit(torch.get_num_threads).result() == engine.threads


TALKS = """
from torch import nn
print("imported")
class Net(nn.Sequential):
    def __init__(self):
        print("made")
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
    def forward(self, x):
        print("called")
        return super().forward(x)
"""


def test_what_the_users_code_prints_is_not_among_the_rows(tmp_path, monkeypatch, engine):
    (tmp_path / "talking_net.py").write_text(TALKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save({"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}, tmp_path / "epoch_1.pt")
    options = ["--model", "talking_net:Net", "--data", "digits", "--n-data", "8", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, ["hessian", "--ckpt-dir", str(tmp_path), *options])
    assert result.exit_code == 0
    assert {json.loads(line)["epoch"] for line in result.stdout.splitlines()} == {1}
    for word in ("imported", "made", "called"):
        assert word in result.stderr
    assert engine.submit(os.path.sameopenfile, 1, 2).result()
    (tmp_path / "epoch_1.pt").write_bytes(b"")
    assert CliRunner().invoke(app, ["hessian", "--ckpt-dir", str(tmp_path), *options]).stdout == ""


def test_a_script_that_does_not_guard_its_main_is_told_so(tmp_path, runs):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    result = subprocess.run([sys.executable, script, runs, tmp_path], capture_output=True, text=True, check=False)
    assert "`if __name__ == '__main__':`" in result.stderr
    assert "no process could be started" in result.stderr


OWN = """
import sys
import torch
from fpq_analysis import ForeignRuns, HessianTrace, measure
from tests.nets import tiny
def Net():
    return tiny()
if __name__ == "__main__":
    torch.save(Net().state_dict(), "epoch_1.pt")
    for jobs in (1, 2):
        source = ForeignRuns(".", Net, "digits")
        frame = measure(source, HessianTrace(), n_data=16, device="cpu", jobs=jobs, overwrite=True)
        print(*frame.iloc[-1][["model", "factory", "key", "value"]])
"""


def test_a_network_that_stands_in_a_script_is_the_same_one_in_its_processes(tmp_path):
    """There the script's own module has another name, `__mp_main__`."""
    script = tmp_path / "script.py"
    script.write_text(OWN)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd=tmp_path)
    here, there = (line.split() for line in done.stdout.splitlines())
    assert here[0] == "__main__:Net"
    assert there[:3] == here[:3]
    assert float(there[3]) == pytest.approx(float(here[3]), rel=1e-6)


def test_code_that_was_changed_meanwhile_is_not_measured_under_the_old_key(tmp_path, monkeypatch):
    """By a process that was started later, or a job that had waited."""
    mine = tmp_path / "changing_net.py"
    mine.write_text("from tests.nets import tiny\ndef Net():\n    return tiny()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    torch.save(tiny().state_dict(), tmp_path / "epoch_1.pt")
    todo = plan(ForeignRuns(tmp_path, "changing_net:Net", "digits"), HessianTrace(), Sampling(16, device="cpu"))
    mine.write_text(mine.read_text() + "\nNet.scale = 2\n")
    with (
        ProcessEngine(1, "cpu") as engine,
        pytest.raises(UserError, match="is not what it was when this command began"),
    ):
        run(todo, executor=engine)
    assert not rows_in(tmp_path)


def test_engines_are_named(tmp_path):
    for given, message in {
        (None, "0"): "no number of processes",
        (None, "two"): "no number of processes",
        ("proceses", 2): "did you mean 'processes'",
        ("processes:4", 1): "--jobs says how many",
        ("serial", 2): "this process alone",
    }.items():
        with pytest.raises(UserError, match=message):
            open_engine(*given)
    with open_engine("processes", "auto", device="cpu") as engine:
        assert engine.jobs == len(os.sched_getaffinity(0))
    assert "processes of" in engine.outlook(40, 80.0)


def test_an_engine_of_another_package_is_found_by_its_entry_point(monkeypatch):
    class Elsewhere(Engine):
        def __init__(self, address, resources):
            self.given = address, resources

        @classmethod
        def open(cls, address, resources):
            return cls(address, resources)

    class Point:
        name = value = "elsewhere"
        load = staticmethod(lambda: Elsewhere)

    monkeypatch.setattr("fpq_analysis.pipeline.engines.engine.entry_points", lambda group: [Point])
    with open_engine("elsewhere://host:80/a?b=c:d", "auto", folder="x") as engine:
        assert engine.given == ("host:80/a?b=c:d", Resources(None, "auto", Path("x")))
    Point.load = staticmethod(lambda: __import__("no_such_package"))
    with pytest.raises(UserError, match="no_such_package"):
        open_engine("elsewhere")


def test_the_command_line_measures_on_several_processes(runs):
    options = ["--model", NET, "--device", "cpu", "--n-data", 16, "--epochs", "1,2"]
    text = call("hessian", "--ckpt-dir", runs, *options, "--jobs", 2)
    assert "0 done, 6 to do" in text
    assert "6 done, 0 to do" in call("hessian", "--ckpt-dir", runs, *options)
    assert "did you mean" in call("hessian", "--ckpt-dir", runs, "--executor", "seriel", code=1)


def test_a_sweep_is_trained_on_several_processes(tmp_path, engine):
    """Teachers first."""
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(out=tmp_path / "runs"))
    lines = []
    frame = run_sweep(study, device="cpu", executor=engine, log=lines.append)
    assert list(frame["status"]) == 6 * [DONE]
    order = [line.split()[0] for line in lines if "is handed out" in line]
    assert len(order) == 6
    assert all("-fp-" in name for name in order[:2])
    study.write_text(study.read_text().replace("seed = [0, 1]", "seed = 0"))
    alone = run_sweep(read_sweep(study, out=tmp_path / "alone"), device="cpu", log=lambda line: None)
    accuracies = frame.set_index("run")["test_accuracy"]
    assert list(accuracies[alone["run"]]) == list(alone["test_accuracy"])
    study.write_text(study.read_text().replace("lr = 0.02", "lr = 1e30"))
    frame = run_sweep(read_sweep(study, out=tmp_path / "bad"), device="cpu", executor=engine, log=lines.append)
    assert list(frame["status"]) == [DONE, FAILED, FAILED]
    assert "sweep.toml" in call("train", "--jobs", 2, code=1)
