"""Sweeps: what a file means, what is run, what a kill leaves, and the files that are shipped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch

from fpq_analysis import TrainConfig, UserError, train
from fpq_analysis.runs import Run
from fpq_analysis.runs.checkpoint import read_checkpoint
from fpq_analysis.text import parse_shard
from fpq_analysis.training import read_sweep, run_sweep, sweep_status
from fpq_analysis.training.sweep import DONE, FAILED, WAITS, parse_sweep, summary
from tests.test_cli import call
from tests.words import words

CONFIGS = Path(__file__).parent.parent / "configs"

STUDY = """
out = "{out}"

[run]
model = "tests.nets:tiny"
batch_size = 128
epochs = 2
lr = 0.02

[teacher]
lr = 0.1

[[grid]]
method = ["lsq", "fpq"]
bits = ["w4a4"]
seed = [0, 1]
"""
RUNS = [
    "tests.nets.tiny-digits-fp-s0",
    "tests.nets.tiny-digits-fp-s1",
    *(f"tests.nets.tiny-digits-{method}-w4a4-s{seed}" for seed in (0, 1) for method in ("lsq", "fpq")),
]


def quiet(line: str) -> None:
    pass


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(out=tmp_path / "runs"))
    return path


def parse(text, out="runs"):
    return parse_sweep(tomllib.loads(text), out)


def test_a_grid_and_its_teachers(study):
    sweep = read_sweep(study)
    assert list(sweep.runs) == RUNS
    assert sweep.runs[RUNS[0]] == TrainConfig(model="tests.nets:tiny", batch_size=128, epochs=2, lr=0.1)
    student = sweep.runs[RUNS[5]]
    assert (student.method, student.bits, student.seed, student.lr) == ("fpq", "W4A4", 1, 0.02)
    assert student.init == str(sweep.out / RUNS[1])
    assert sweep.teachers[RUNS[5]] == RUNS[1]


def test_a_file_of_one_run():
    sweep = parse("[run]\nepochs = 3")
    assert list(sweep.runs.values()) == [TrainConfig(epochs=3)]


def test_names_tell_what_differs_from_the_shared_settings():
    """The value that [run] has is not in the name, so the ablation of one file is the main run of another."""
    text = '[run]\nbits = "W2A4"\nmethod = "fpq"\n[[grid]]\nsfp_p = [0, 0.1, 0.3]\n[[grid]]\ncsd_weight = 0'
    assert list(parse(text).runs) == [
        "resnet20-digits-fp-s0",
        "resnet20-digits-fpq-w2a4-s0-sfp_p0",
        "resnet20-digits-fpq-w2a4-s0",
        "resnet20-digits-fpq-w2a4-s0-sfp_p0.3",
        "resnet20-digits-fpq-w2a4-s0-csd_weight0",
    ]


def test_float_runs_of_a_grid_are_the_teachers():
    text = '[teacher]\nepochs = 9\n[[grid]]\nmethod = ["fp", "lsq"]\nbits = "W4A4"\nsfp_p = [0.1, 0.2]'
    sweep = parse(text)
    assert [config.bits for config in sweep.runs.values()].count(None) == 1
    assert sweep.runs["resnet20-digits-fp-s0"].epochs == 9


def test_one_teacher_for_all_seeds_and_one_made_elsewhere():
    grid = '[[grid]]\nmethod = "lsq"\nbits = "W4A4"\nseed = [1, 2]'
    sweep = parse(f"[teacher]\nseed = 0\n{grid}")
    assert set(sweep.teachers.values()) == {"resnet20-digits-fp-s0"}
    sweep = parse(f'[run]\ninit = "mine/fp"\n{grid}')
    assert list(sweep.runs) == ["resnet20-digits-lsq-w4a4-s1", "resnet20-digits-lsq-w4a4-s2"]
    assert not sweep.teachers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nepoch = 3", "Unknown key 'epoch' in \\[run\\] \\(did you mean 'epochs'"),
        ("[teachers]\nlr = 0.1", "Unknown section 'teachers' in the file \\(did you mean 'teacher'"),
        ("[teacher]\nmodel = 'resnet18'", "Unknown key 'model' in \\[teacher\\]"),
        ("[[grid]]\nmethods = ['lsq']", "did you mean 'method'"),
        ("[[grid]]\nmethod = ['lsq', 'fpqq']", "Unknown method 'fpqq' in \\[\\[grid\\]\\] \\(did you mean 'fpq'"),
        ("[run]\nmodel = 'resnet81'", "did you mean 'resnet18'"),
        ("[run]\ndata = 'cifar11'", "did you mean 'cifar10"),
        ("[run]\nlr = '0.1'", "lr in \\[run\\] is '0.1', and must be a number"),
        ("[run]\nepochs = 2.5", "must be a whole number"),
        ("[run]\nepochs = true", "must be a whole number"),
        ("[run]\naugment = 1", "must be true or false"),
        ("[run]\nseed = [0, 1]", "Lists make grids"),
        ("[[grid]]\nseed = []", "empty list"),
        ("run = 3", "a line \\[run\\]"),
        ("grid = 3", "a line \\[\\[grid\\]\\]"),
        ("[[grid]]\nmethod = 'lsq'", "needs a bit width"),
        ("[[grid]]\nmethod = 'lsq'\nbits = 'W1A4'", "1-bit weights"),
    ],
)
def test_bad_files(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_bad_files_on_the_command_line(tmp_path, study):
    assert "No file" in words(call("train", "--config", tmp_path / "nothing.toml", code=1).stderr)
    (tmp_path / "torn.toml").write_text("[run")
    assert "is not TOML" in words(call("train", "--config", tmp_path / "torn.toml", code=1).stderr)
    (tmp_path / "typo.toml").write_text("[run]\nepoch = 3")
    text = " ".join(call("train", "--config", tmp_path / "typo.toml", code=1).stderr.split())
    assert "typo.toml: Unknown key 'epoch'" in text
    result = call("train", "--config", study, "--lr", 0.1, code=1)
    assert "settings come from the file" in " ".join(result.stderr.split())
    assert "do not go together" in words(call("train", "--config", study, "--overwrite", code=1).stderr)
    assert "needs the sweep's file" in words(call("train", "--shard", "1/2", code=1).stderr)


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_bad_shards(text):
    with pytest.raises(UserError, match="not a part"):
        parse_shard(text)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_shards_share_out_all_runs(study, n):
    sweep = read_sweep(study)
    parts = [sweep.shard(i, n) for i in range(1, n + 1)]
    assert sorted(name for part in parts for name in part) == sorted(sweep.runs)
    if n == 2:  # a teacher for each: no part needs another one's
        for part in parts:
            assert all(sweep.teachers[name] in part for name in part if name in sweep.teachers)


def test_a_sweep_from_the_command_line(study, tmp_path):
    result = call("train", "--config", study, "--dry-run")
    assert "6 runs: 0 done, 6 to do; how long" in words(result.stderr)
    assert not (tmp_path / "runs").exists()
    # The second part has the teacher of seed 1, and this one's; nothing is missing.
    result = call("train", "--config", study, "--device", "cpu", "--shard", "2/2")
    assert "3 runs: 3 done, 0 to do" in words(result.stderr)
    result = call("train", "--config", study, "--dry-run")
    assert "6 runs: 3 done, 3 to do, about" in words(result.stderr)  # the time from what was run
    assert all(len(line) <= 80 for line in result.stdout.splitlines()), result.stdout
    result = call("train", "--config", study, "--device", "cpu", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["run"] for row in rows] == RUNS
    assert all(row["status"] == DONE and 0 <= row["test_accuracy"] <= 1 for row in rows)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    assert "6 runs: 6 done, 0 to do" in words(call("train", "--config", study, "--device", "cpu").stderr)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}


def test_a_part_without_its_teacher_says_what_is_missing(study, tmp_path):
    """Three parts, two teachers: the third has students only."""
    result = call("train", "--config", study, "--device", "cpu", "--shard", "3/3", code=1)
    text = " ".join(result.stderr.split())
    assert f"1 of 1 runs wait for float runs that are not finished in '{tmp_path / 'runs'}': {RUNS[1]}." in text
    assert "--shard 3/3" in text
    assert WAITS in result.stdout


KILLED = "import sys; from fpq_analysis.cli import main; sys.argv[0] = 'fpq-analyze'; main()"


def timeless(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=["seconds", "seconds_left"])


def test_killed_twice_and_finished_is_the_same_table(study, tmp_path):
    """SIGKILL in the middle of a teacher and of a student; the same command goes on."""
    study.write_text(study.read_text().replace("seed = [0, 1]", "seed = 0"))
    whole = run_sweep(read_sweep(study, out=tmp_path / "whole"), device="cpu", log=quiet)
    sweep = read_sweep(study)
    arguments = ["train", "--config", str(study), "--device", "cpu"]
    for until in list(sweep.runs)[:2]:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not (sweep.out / until / "epoch_0001.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert DONE not in set(sweep_status(sweep)["status"][1:])
    call(*arguments)
    pd.testing.assert_frame_equal(timeless(sweep_status(sweep)), timeless(whole))
    for name in sweep.runs:  # not the files' hashes: a student names its teacher's folder, which differs
        a, b = (read_checkpoint(root / name / "epoch_0002.pt").state_dict for root in (sweep.out, tmp_path / "whole"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_kill_after_the_last_checkpoint_of_a_teacher(study, tmp_path):
    """The optimiser's state is still there, and the teacher is finished all the same."""
    sweep = read_sweep(study)
    train(sweep.runs[RUNS[0]], sweep.out / RUNS[0], device="cpu", log=quiet)
    torch.save({"epoch": 2, "optimizer": {}}, sweep.out / RUNS[0] / "resume.pt")
    frame = run_sweep(sweep, shard="1/2", device="cpu", log=quiet)
    assert set(frame["status"]) == {DONE}


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    text = STUDY.format(out="x").replace("seed = [0, 1]", "lr = [0.02, 1e12]").replace('"lsq", ', "")
    lines: list[str] = []
    frame = run_sweep(parse(text, tmp_path / "runs"), device="cpu", log=lines.append)
    assert list(frame["status"]) == [DONE, DONE, FAILED]
    assert any("smaller --lr" in line for line in lines)


def test_a_run_that_changed_is_not_taken_for_done(study, tmp_path):
    sweep = read_sweep(study)
    run_sweep(sweep, shard="1/2", device="cpu", log=quiet)
    other = parse(study.read_text().replace("batch_size = 128", "batch_size = 64"), sweep.out)
    with pytest.raises(UserError, match="batch_size = 128"):
        sweep_status(other)
    # Moved, it is done still; with another teacher in the old one's place it is not.
    moved = shutil.move(sweep.out, tmp_path / "moved")
    elsewhere = read_sweep(study, out=moved)
    assert list(sweep_status(elsewhere)["status"]).count(DONE) == 3
    teacher = elsewhere.out / RUNS[0]
    shutil.rmtree(teacher)
    train(elsewhere.runs[RUNS[0]], teacher, device="cpu", log=quiet)
    assert list(sweep_status(elsewhere)["status"]).count(DONE) == 3  # the same bits
    manifest = teacher / "manifest.json"
    manifest.write_text(manifest.read_text().replace(read_checkpoint(Run(teacher).checkpoints[2]).sha256, "0" * 64))
    with pytest.raises(UserError, match="another teacher"):
        sweep_status(elsewhere)


def test_bad_teachers(tiny_runs, tmp_path):
    """Made elsewhere: missing, and of another shape.  A paragraph each, and the other runs go on."""
    grid = '[run]\nmodel = "{}"\nmethod = "lsq"\nbits = "W4A4"\nepochs = 1\ninit = "{}"'
    for model, init, message in (
        ("tests.nets:tiny", tmp_path / "nowhere", "No run"),
        ("resnet20", tiny_runs / "fp", "must be the same network"),
    ):
        lines: list[str] = []
        frame = run_sweep(parse(grid.format(model, init), tmp_path / "out"), device="cpu", log=lines.append)
        assert list(frame["status"]) == [FAILED]
        assert message in lines[-2]
        assert not (tmp_path / "out").exists()


def test_missing_data_stop_the_sweep_at_once(tmp_path):
    sweep = parse('[run]\ndata = "cifar10"\ndata_root = "/nowhere"', tmp_path)
    with pytest.raises(UserError, match="--download"):
        run_sweep(sweep, device="cpu", log=quiet)


def test_summaries():
    frame = pd.DataFrame({"status": [DONE, "to do", "to do"], "seconds_left": [0.0, 60.0, float("nan")]})
    assert summary(frame) == "3 runs: 1 done, 2 to do, about 1 min 00 s left and 1 of unknown length"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_files_can_be_read(path):
    sweep = read_sweep(path)
    assert sweep.runs


@pytest.mark.parametrize("names", [CONFIGS.glob("*.toml"), (CONFIGS / "small").glob("*.toml")], ids=["paper", "small"])
def test_shipped_files_that_share_a_folder_agree_on_its_runs(names):
    found: dict[tuple[str, str], TrainConfig] = {}
    for path in names:
        sweep = read_sweep(path)
        for name, config in sweep.runs.items():
            assert found.setdefault((str(sweep.out), name), config) == config


def test_every_table_and_figure_has_a_file_and_a_small_twin():
    names = {*(f"table{i}" for i in range(1, 6)), *(f"figure{i}" for i in range(1, 6))}
    assert {path.stem for path in CONFIGS.glob("*.toml")} == names | {"demo", "cifar10", "cifar10_mobilenet"}
    assert {path.stem for path in (CONFIGS / "small").glob("*.toml")} == names
