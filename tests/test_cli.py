"""The command line as a user meets it: what is printed, what is left on disk, how it fails."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from fpq_analysis import files, records
from fpq_analysis.cli import app
from fpq_analysis.cli.measuring import shorten_runs
from fpq_analysis.probes import HessianTrace
from tests.test_files import Canary
from tests.words import words

MODEL = ["--model", "tests.nets:tiny"]
FAST = [*MODEL, "--n-data", "32", "--device", "cpu"]


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def runs(tiny_runs, tmp_path):
    shutil.copytree(tiny_runs, tmp_path / "runs")
    return tmp_path / "runs"


def test_train_then_hessian(tmp_path):
    common = ["train", *MODEL, "--device", "cpu", "--epochs", 1, "--batch-size", 64]
    call(*common, "--lr", 0.1, "--out", "checkpoints/fp")
    result = call(*common, "--method", "lsq", "--bits", "w4a4", "--init", "checkpoints/fp", "--json")
    assert [json.loads(line)["epoch"] for line in result.stdout.splitlines()] == [0, 1]
    assert (tmp_path / "checkpoints" / "tests.nets.tiny-digits-lsq-w4a4-s0" / "epoch_0001.pt").exists()
    result = call("hessian", *FAST)
    assert "0 done, 4 to do" in words(result.stderr)
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    for suffix in (".png", ".pdf", ".txt"):
        assert (tmp_path / "figures" / f"figure5{suffix}").stat().st_size > 0


def test_hessian_measures_once(runs, tmp_path):
    arguments = ["hessian", "--ckpt-dir", runs, *FAST, "--figures", tmp_path / "figures"]
    assert "0 done, 9 to do" in words(call(*arguments).stderr)
    first = records.read(runs, sorted(runs.iterdir()), "hessian_trace")
    result = call(*arguments, "--json")
    assert "9 done, 0 to do" in words(result.stderr)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == len(first)
    totals = [row for row in rows if row["layer"] == "all" and row["quantity"] == "trace"]
    assert len(totals) == 9
    assert {row["run"] for row in totals} == {"fp", "lsq-w4a4", "fpq-w4a4"}
    assert all(row["estimator"] == "exact" and row["sem"] == 0 and row["sem_data"] > 0 for row in totals)
    # Layers add up, and another seed or definition is another measurement.
    for total in totals:
        parts = [r["value"] for r in rows if r["key"] == total["key"] and r["layer"] != "all"]
        assert sum(parts) == pytest.approx(total["value"], rel=1e-5)
    assert "0 done, 9 to do" in words(call(*arguments, "--definition", "latent", "--dry-run").stderr)
    assert "0 done, 9 to do" in words(call(*arguments, "--overwrite", "--dry-run").stderr)


def test_sentence_about_fpq_and_lsq(runs, tmp_path):
    result = call("hessian", "--ckpt-dir", runs, *FAST, "--figures", tmp_path)
    text = " ".join(result.stdout.split())
    assert "On the same samples" in text
    assert "lsq-w4a4" in text.split("On the same samples")[1]
    assert "at epoch 2" in text


def test_pyhessian_engine(runs, tmp_path):
    arguments = ["hessian", "--ckpt-dir", runs / "fp", *FAST, "--figures", tmp_path]
    few = [*arguments, "--epochs", "0"]  # the same weights on every processor, from the seed
    call(*few)
    call(*few, "--engine", "pyhessian", "--n-products", 60)
    frame = records.read(runs, [runs / "fp"], "hessian_trace")
    totals = frame[(frame["layer"] == "all") & (frame["quantity"] == "trace")]
    exact, theirs = (totals[totals["estimator"] == how].iloc[0] for how in ("exact", "pyhessian"))
    assert abs(exact["value"] - theirs["value"]) < 4 * theirs["sem"]
    call(*arguments, "--engine", "pyhessian", "--method", "exact", code=1)


def test_a_damaged_checkpoint_among_good_ones(runs, tmp_path):
    path = runs / "fp" / "epoch_0001.pt"
    path.write_bytes(path.read_bytes()[:1000])
    result = call("hessian", "--ckpt-dir", runs, *FAST, "--figures", tmp_path, code=1)
    assert "8 to do, 1 unreadable" in words(result.stderr)
    assert "epoch_0001.pt" in result.stderr
    assert "1 of 9 checkpoints could not be measured" in words(result.stderr)
    assert len(records.done(runs / "fp", "hessian_trace")) == 2


def test_records_that_cannot_be_read_among_good_ones(runs, tmp_path):
    """The run is not measured, as its rows could not be written; the others' numbers and figures are all there."""
    fast = [*FAST, "--epochs", "2"]
    call("hessian", "--ckpt-dir", runs, *fast, "--figures", tmp_path)
    file = runs / "fp" / "records" / "hessian_trace.jsonl"
    file.unlink()
    file.mkdir()
    for more in ([], ["--overwrite"]):
        result = call("hessian", "--ckpt-dir", runs, *fast, *more, "--figures", tmp_path, "--json", code=1)
        assert {json.loads(line)["run"] for line in result.stdout.splitlines()} == {"lsq-w4a4", "fpq-w4a4"}
        assert "hessian_trace.jsonl' cannot be" in words(result.stderr)
    call("figures", "5", "--ckpt-dir", runs, "--no-measure", "--out", tmp_path / "drawn", code=1)
    assert (tmp_path / "drawn" / "figure5.png").exists()
    call("report", "--ckpt-dir", runs, "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "lsq-w4a4" in page
    assert "hessian_trace.jsonl" in page


def test_a_nan_checkpoint_among_good_ones(runs, tmp_path):
    path = runs / "fp" / "epoch_0001.pt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["3.weight"].fill_(torch.nan)
    torch.save(content, path)
    (runs / "fp" / "manifest.json").unlink()
    result = call("hessian", "--ckpt-dir", runs / "fp", *FAST, "--figures", tmp_path, code=1)
    assert "NaN" in result.stderr
    assert len(records.done(runs / "fp", "hessian_trace")) == 2


def test_a_malicious_checkpoint_among_good_ones(runs, tmp_path):
    torch.save({"state_dict": Canary(tmp_path / "canary")}, runs / "fp" / "epoch_0003.pt")
    result = call("hessian", "--ckpt-dir", runs / "fp", *FAST, "--figures", tmp_path, code=1)
    assert "Nothing was run" in " ".join(result.stderr.split())
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hessian", "--ckpt-dir", "nowhere"], "No folder 'nowhere'"),
        (["hessian", "--ckpt-dir", "."], "holds no checkpoints"),
        (["hessian", "--engine", "pyhesian"], "Unknown engine"),
        (["hessian", "--n-data", "1"], "at least 2 samples"),
        (["hessian", "--n-data", "0"], "at least 2 samples"),
        (["train", "--method", "lsq", "--bits", "W4"], "W4"),
        (["hessian", "--method", "exakt"], "did you mean 'exact'"),
        (["train", "--method", "lsq", "--bits", "W0A4", "--init", "x"], "0-bit weights"),
        (["train", "--method", "sfp"], "Unknown method 'sfp'"),
        (["train", "--data", "imagefolder", "--data-root", "nowhere"], "No folder 'nowhere'"),
        (["train", "--data", "cifar10", "--data-root", "."], "--download"),
        (["train", "--device", "cuda:99"], "not available"),
        (["train", "--model", "resnet200"], "did you mean"),
        (["train", "--method", "fpq", "--bits", "W4A4", "--init", "nowhere"], "No run 'nowhere'"),
    ],
)
def test_bad_input_is_one_paragraph(arguments, message):
    result = call(*arguments, code=1)
    text = " ".join(result.stderr.split())
    assert message in text
    assert text.count("Error:") == 1


def test_another_architecture(runs, tmp_path):
    result = call("hessian", "--ckpt-dir", runs / "fp", "--model", "resnet20", "--figures", tmp_path, code=1)
    assert "does not fit the model 'resnet20'" in " ".join(result.stderr.split())


def test_misuse_exits_with_2():
    call("hessian", "--no-such-option", code=2)
    call("no-such-command", code=2)
    call("hessian", "--n-data", "many", code=2)


def test_a_fault_of_the_program_is_no_traceback(runs, monkeypatch, tmp_path):
    def broken(self, point):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(HessianTrace, "__call__", broken)
    result = call("hessian", "--ckpt-dir", runs, *FAST, "--figures", tmp_path, code=1)
    assert "FPQ_DEBUG=1" in result.stderr


def test_names_are_shown_as_they_are(runs, tmp_path):
    """`[red]abc` was shown as `abc`, `a[/b]` was a MarkupError, and an ESC reached the terminal."""
    names = {"fp": "[red]abc", "lsq-w4a4": "a[[b]/c]", "fpq-w4a4": "\x1b[31m$\\frac$"}
    for old, new in names.items():
        (runs / old).rename(runs / new.replace("/", ":"))
    result = call("hessian", "--ckpt-dir", runs, *FAST, "--figures", tmp_path / "figures", "--epochs", "last")
    for shown in ("[red]abc", "a[[b]:c]", "\\x1b[31m$\\frac$"):
        assert shown in result.stdout
    assert "\x1b" not in result.output
    (runs / "[red]abc" / "epoch_0001.pt").write_bytes(b"")
    result = call("hessian", "--ckpt-dir", runs, *FAST, "--figures", tmp_path / "figures", code=1)
    assert "[red]abc/epoch_0001.pt" in result.stderr
    call("report", "--ckpt-dir", runs, "-o", tmp_path / "report.html")
    call("inspect", runs / "[red]abc", code=1)


@pytest.mark.parametrize("where", ["figures", "records"])
def test_a_file_where_a_folder_is_wanted(where, runs, tmp_path):
    """It was called a fault of the program; what was measured is kept, and the others go on."""
    path = tmp_path / "figures" if where == "figures" else runs / "fp" / "records"
    path.write_text("mine")
    options = ["hessian", "--ckpt-dir", runs, *FAST, "--epochs", "last", "--figures", tmp_path / "figures"]
    result = call(*options, code=1)
    text = " ".join(result.stderr.split())
    assert "A file stands where a folder is wanted" in text
    assert "fault of the program" not in text
    assert path.read_text() == "mine"
    measured = [run.name for run in runs.iterdir() if records.done(run, "hessian_trace")]
    assert sorted(measured) == (["fp"] if where == "figures" else []) + ["fpq-w4a4", "lsq-w4a4"]


def test_ctrl_c_keeps_what_was_measured(runs, tmp_path):
    command = [sys.executable, "-m", "fpq_analysis.cli", "hessian", "--ckpt-dir", str(runs), *MODEL, "--device", "cpu"]
    command += ["--figures", str(tmp_path), "--method", "hutchinson", "--n-products", "50"]
    # A shell's background jobs, and so all they start, ignore Ctrl-C: undo that, in case the tests run as one.
    undo = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=undo)
    deadline = time.monotonic() + 60
    while not list(runs.rglob("records/*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped" in message
    assert "Traceback" not in message
    finished = sum(len(records.done(run, "hessian_trace")) for run in runs.iterdir())
    assert 0 < finished < 9


@pytest.mark.parametrize("command", [[], ["train"], ["hessian"], ["compare"], ["doctor"], ["inspect"], ["demo"]])
def test_help_has_an_example(command):
    result = call(*command, "--help")
    if command:
        assert f"fpq-analyze {command[0]}" in words(result.output)


def test_help_is_quick():
    code = "import sys, fpq_analysis.cli; sys.exit(bool({'torch', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dry_run_trains_nothing(tmp_path):
    assert "lr = 0.5" in words(call("train", "--lr", 0.5, "--dry-run").stderr)
    assert not list(tmp_path.iterdir())


def test_forecast(runs):
    result = call("hessian", "--ckpt-dir", runs, *MODEL, "--device", "cpu", "--dry-run")
    assert "seconds" in result.stdout
    assert not list(runs.rglob("records"))


def test_other_data_than_trained_on(runs, tmp_path):
    for run in runs.iterdir():
        for path in run.glob("epoch_*.pt"):
            content = torch.load(path, weights_only=True)
            content["data"]["fingerprint"] = "0" * 16
            torch.save(content, path)
        (run / "manifest.json").unlink()
        (run / "run.json").unlink()  # it would say another thing, which is a fault of its own
    result = call("hessian", "--ckpt-dir", runs / "fp", *FAST, "--figures", tmp_path, code=1)
    assert "not those the checkpoint was trained on" in " ".join(result.stderr.split())


def test_everything_at_once(runs, tmp_path):
    """Trace, eigenvalues, density and sharpness of one run, under all definitions."""
    arguments = ["hessian", "--ckpt-dir", runs / "lsq-w4a4", *FAST, "--definition", "all", "--top-k", 3, "--density"]
    arguments += ["--sharpness", "--figures", tmp_path / "figures", "--epochs", "last"]
    result = call(*arguments)
    assert all(len(line) <= 80 for line in result.stdout.splitlines()), result.stdout
    for word in ("dequantized", "latent", "float", "Clip %", "Acc. %", "Eigenv. 1", "spectral density", "scaled_trace"):
        assert word in result.stdout
    for name in ("figure5", "eigenvalues", "density"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 0
    again = call(*arguments, "--json")
    assert words(again.stderr).count("1 done, 0 to do") == 11  # three definitions of each, but latent sharpness
    rows = [json.loads(line) for line in again.stdout.splitlines()]
    values = {(row["definition"], row["epoch"]): row["value"] for row in rows if row["quantity"] == "eigenvalue_1"}
    assert len(values) == 3
    assert values["dequantized", 2] != values["float", 2]


def test_the_gauss_newton_trace_has_records_of_its_own(runs, tmp_path):
    arguments = ["hessian", "--ckpt-dir", runs / "lsq-w4a4", *FAST, "--epochs", "2", "--figures", tmp_path / "figures"]
    result = call(*arguments, "--operator", "gauss-newton")
    assert "exact, gauss-newton" in words(result.stdout)
    assert not (tmp_path / "figures").exists()  # of the Hessian's there are none yet
    call(*arguments)
    names = "gauss_newton_trace", "hessian_trace"
    found = [records.read(runs, [runs / "lsq-w4a4"], name) for name in names]
    values = [frame[(frame["layer"] == "all") & (frame["quantity"] == "trace")]["value"].item() for frame in found]
    assert values[0] == pytest.approx(values[1], rel=1e-6)  # of piecewise linear networks they are one
    assert "measures the trace alone" in words(
        call(*arguments, "--operator", "gauss-newton", "--top-k", 2, code=1).stderr
    )
    assert "Unknown operator" in call(*arguments, "--operator", "fishy", code=1).stderr


def test_compare(runs):
    result = call("compare", runs / "fpq-w4a4", runs / "lsq-w4a4", *FAST)
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "Paired, sample by sample" in words(result.stdout)
    assert "fpq-w4a4" in result.stdout.splitlines()[0]
    assert [line.split()[0] for line in result.stdout.splitlines()[1:4]] == ["0", "1", "2"]
    rows = [
        json.loads(line)
        for line in call("compare", runs / "fpq-w4a4", runs / "lsq-w4a4", *FAST, "--json").stdout.splitlines()
    ]
    frame = records.read(runs, sorted(runs.iterdir()), "hessian_trace")
    totals = frame[(frame["layer"] == "all") & (frame["quantity"] == "trace")].set_index(["run", "epoch"])
    for row in rows:
        ours, theirs = (totals.loc[(run, row["epoch"])] for run in ("fpq-w4a4", "lsq-w4a4"))
        assert row["value"] == pytest.approx(ours["value"] - theirs["value"], abs=1e-5 * theirs["value"])
        gap = torch.tensor(ours["samples"]) - torch.tensor(theirs["samples"])
        assert row["sem"] == pytest.approx(float(gap.std()) / len(gap) ** 0.5, rel=1e-4, abs=1e-5 * theirs["value"])
    kept = call("compare", runs / "fpq-w4a4", runs / "lsq-w4a4", "--no-measure", "--json").stdout
    assert [json.loads(line) for line in kept.splitlines()] == rows
    result = call("compare", runs, runs / "lsq-w4a4", "--no-measure", code=1)
    assert "more than one run" in words(result.stderr)
    result = call("compare", runs / "fpq-w4a4", runs / "fp", "--no-measure", code=1)
    assert "no records of the trace" in words(result.stderr)
    result = call("compare", runs, runs / "lsq-w4a4", *FAST, code=1)
    assert "more than one run" in " ".join(result.stderr.split())
    assert "no folder" in words(call("compare", runs / "nothing", runs / "lsq-w4a4", code=1).stderr).lower()


def test_what_is_on_record_is_compared_alike(runs, tmp_path):
    """What else was measured of one of the runs, of another definition, loss or sample, came in between."""
    pair = [shutil.copytree(runs / name, tmp_path / name) for name in ("fpq-w4a4", "lsq-w4a4")]
    rows = call("compare", *pair, *FAST, "--json").stdout
    others = [{"definition": "float"}, {"loss": "squared_error"}, {"seed": 7}, {"n_data": 16}, {"estimator": "other"}]
    path = pair[0] / "records" / "hessian_trace.jsonl"
    own = files.read_jsonl(path)
    for i, other in enumerate(others):
        for key in dict.fromkeys(row["key"] for row in own):
            some = [{**row, **other, "settings": f"other {i}", "key": f"{key} {i}"} for row in own if row["key"] == key]
            records.append(pair[0], "hessian_trace", [{**row, "value": 2 * row["value"]} for row in some])
    assert call("compare", *pair, "--no-measure", "--json").stdout == rows
    assert "32 samples, drawn by --seed 0" in words(call("compare", *pair, "--no-measure").stdout)
    for option in (["--loss", "squared_error"], ["--definition", "latent"]):
        assert "no records of the trace" in words(call("compare", *pair, "--no-measure", *option, code=1).stderr)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"seed": 7' in line))
    said = words(call("compare", *pair, "--no-measure", code=1).stderr)
    assert "measured on the same samples: on record are 32 by --seed 7, and 32 by --seed 0" in said


def test_compare_over_seeds(runs, tmp_path):
    """The runs beside a run that differ in nothing but their seed; here by name only, so that all seeds are equal."""
    for name in ("fp", "fpq-w4a4", "lsq-w4a4"):
        shutil.copytree(runs / name, tmp_path / name)
    alone = call("compare", tmp_path / "fpq-w4a4", tmp_path / "lsq-w4a4", *FAST, "--over-seeds", code=1)
    assert "no pairs of runs with other training seeds" in words(alone.stderr)
    for seed in (1, 2):
        for name in ("fpq-w4a4", "lsq-w4a4"):
            copy = shutil.copytree(runs / name, tmp_path / f"{name}-{seed}")
            about = json.loads((copy / "run.json").read_text())
            about["config"]["seed"] = seed
            (copy / "run.json").write_text(json.dumps(about))
    arguments = ["compare", tmp_path / "fpq-w4a4", tmp_path / "lsq-w4a4", *FAST, "--over-seeds"]
    result = call(*arguments)
    assert "over 3 training seeds: the trace" in words(result.stdout)
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    rows = [json.loads(line) for line in call(*arguments, "--json").stdout.splitlines()]
    assert rows[-1]["n_seeds"] == 3
    assert rows[-1]["value"] == pytest.approx(rows[-2]["value"], rel=1e-6)
    # Of equal seeds nothing is left but the interval over the images.
    assert rows[-1]["ci95"] == pytest.approx(stats.t.ppf(0.975, 31) * rows[-2]["sem"], rel=1e-6)


def test_compare_runs_of_one_name(runs, tmp_path):
    """Run B's trace stood under "Difference"."""
    named = (("fp", "a"), ("lsq-w4a4", "b"))
    pair = [shutil.copytree(runs / name, tmp_path / side / "Difference") for name, side in named]
    options = [*FAST, "--definition", "float"]
    rows = [json.loads(line) for line in call("compare", *pair, *options, "--json").stdout.splitlines()]
    names = {(row["run"], row["baseline"]) for row in rows}
    assert names == {("a/Difference", "b/Difference")}
    result = call("compare", *pair, *options)
    lines = result.stdout.splitlines()
    assert words(lines[0]).split() == ["Epoch", "a/Difference", "b/Difference", "Difference", "±", "95", "%"]
    for line, row in zip(lines[1:4], rows, strict=True):
        epoch, ours, theirs, difference, _ = line.split()
        assert int(epoch) == row["epoch"]
        wanted = (row["baseline_value"] + row["value"], row["baseline_value"], row["value"])
        assert [float(x) for x in (ours, theirs, difference)] == pytest.approx(wanted, rel=1e-2)
    assert "a/Difference" in words(result.stdout.split("Difference", 3)[-1])
    assert "are one run" in words(call("compare", pair[0], pair[0] / ".", *options, code=1).stderr)
    copy = shutil.copytree(pair[0], tmp_path / "c" / "Difference")
    rows = [json.loads(line) for line in call("compare", pair[0], copy, *options, "--json").stdout.splitlines()]
    assert [row["value"] for row in rows] == [0, 0, 0]


def test_a_tolerance_draws_as_few_images_as_it_takes(runs, tmp_path):
    """Of the untrained network, whose images are much alike; of a trained one it may take them all."""
    arguments = ["hessian", "--ckpt-dir", runs / "fp", "--epochs", 0, *MODEL, "--device", "cpu", "--figures", tmp_path]
    rows = [json.loads(line) for line in call(*arguments, "--tol", 0.1, "--json").stdout.splitlines()]
    (row,) = [row for row in rows if row["layer"] == "all" and row["quantity"] == "trace"]
    assert row["estimator"] == "sampled"
    assert row["n_data"] < 1442
    assert row["sem"] <= 0.1 * row["value"]
    assert row["sem"] <= row["sem_data"]


def test_long_names_of_runs_lose_what_they_share(capsys):
    names = ["resnet20-imagefolder-lsq-w4a4-s0", "resnet20-imagefolder-lsq-w2a4-s0", "resnet20-imagefolder-fp-s0"]
    frame = pd.DataFrame({"run": names, "value": range(3)})
    assert list(shorten_runs(frame)["run"]) == ["lsq-w4a4-s0", "lsq-w2a4-s0", "fp-s0"]
    assert "resnet20-imagefolder-, which is left out" in capsys.readouterr().err
    for same in (
        frame[:1],
        frame.assign(run=["fp", "lsq-w4a4", "lsq-w2a4"]),
        frame.assign(run=["a" * 20, "b" * 20, "c"]),
    ):
        assert list(shorten_runs(same)["run"]) == list(same["run"])


def test_threads_do_not_spin_for_long(tmp_path):
    """What torch finds in the environment when it is loaded; a user's own choice stands."""
    code = """
import os, sys
from fpq_analysis.cli import main

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("found", os.environ["GOMP_SPINCOUNT"])
            sys.exit()

sys.meta_path.insert(0, Watch())
main()
"""
    command = [sys.executable, "-c", code, "demo"]
    for chosen, expected in (("", "found 10000"), ("7", "found 7")):
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        environment |= {"GOMP_SPINCOUNT": chosen} if chosen else {}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert expected in done.stdout.splitlines()
