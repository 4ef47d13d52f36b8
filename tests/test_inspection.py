"""Every kind of file is described, and nothing in it is run."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import struct

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fpq_analysis import UserError
from fpq_analysis.cli import app
from fpq_analysis.files import read_jsonl, sha256
from fpq_analysis.runs.inspection import inspect_checkpoint, inspect_quantizers, inspect_run, unsafe_names
from tests.nets import tiny
from tests.test_files import Canary
from tests.words import words


def fields(path):
    frame = inspect_checkpoint(path)
    assert list(frame.columns) == ["field", "value"]
    assert not frame["field"].duplicated().any()
    return dict(frame.itertuples(index=False))


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines()) or "--json" in arguments
    return result


@pytest.fixture
def run(tiny_runs, tmp_path):
    shutil.copytree(tiny_runs / "lsq-w4a4", tmp_path / "run")
    return tmp_path / "run"


def test_a_good_checkpoint(run):
    path = run / "epoch_0002.pt"
    found = fields(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    expected = {
        "kind": "fpq-analyze checkpoint",
        "size": f"{path.stat().st_size:,} bytes",
        "sha256": sha256(path),
        "manifest": "ok",
        "safe": "yes: tensors and plain values only",
        "epoch": "2",
        "method": "lsq",
        "bits": "W4A4, first and last layer 8",
        "training seed": "0",
        "scalars": f"{sum(t.numel() for t in state.values()):,}",
        "non-finite": "none",
    }
    assert {field: found[field] for field in expected} == expected
    assert found["architecture"].startswith("tests.nets:tiny, 10 classes")
    assert found["data set"].startswith("digits, 1,4")
    assert f"torch {torch.__version__.partition('+')[0]}" in found["versions"]


def test_step_sizes(run, tiny_runs):
    path = run / "epoch_0002.pt"
    frame = inspect_quantizers(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert len(frame) == sum(name.endswith("step_size") for name in state) == 8
    assert frame.groupby("layer", sort=False)["bits"].first().to_dict() == {"0": 8, "3": 4, "6": 4, "11": 8}
    steps = state["3.parametrizations.weight.0.step_size"]
    row = frame[(frame["layer"] == "3") & (frame["of"] == "weight")].iloc[0]
    assert row["step sizes"] == steps.numel() == 8
    assert (row["smallest"], row["largest"]) == pytest.approx((float(steps.min()), float(steps.max())))
    assert inspect_quantizers(tiny_runs / "fp" / "epoch_0002.pt").empty


def test_command(run):
    result = call(run / "epoch_0002.pt")
    assert "Step sizes" in result.stdout
    rows = [json.loads(line) for line in call(run / "epoch_0002.pt", "--json").stdout.splitlines()]
    assert {"field": "epoch", "value": "2"} in rows
    assert sum("layer" in row for row in rows) == 8


def test_a_run(run):
    frame = inspect_run(run)
    assert frame["epoch"].tolist() == [0, 1, 2]
    assert set(frame["hash"]) == {"ok"}
    assert frame["test accuracy"].tolist() == [row["test_accuracy"] for row in read_jsonl(run / "train.jsonl")]
    assert "epoch_0001.pt" in call(run).stdout
    (run / "epoch_0000.pt").unlink()
    (run / "epoch_0001.pt").write_bytes(b"other")
    frame = inspect_run(run).set_index("epoch")
    assert frame["hash"].to_dict() == {0: "missing", 1: "differs", 2: "ok"}
    assert "2 of 3 checkpoints" in words(call(run, code=1).stderr)
    (run / "manifest.json").unlink()
    assert set(inspect_run(run)["hash"]) == {"not recorded"}


def test_no_checkpoint(tmp_path):
    assert "holds no checkpoint" in words(call(tmp_path, code=1).stderr)
    assert "No checkpoint" in words(call(tmp_path / "a.pt", code=1).stderr)


def test_manifest_mismatch(run):
    path = run / "epoch_0001.pt"
    path.write_bytes((run / "epoch_0002.pt").read_bytes())
    text = words(call(path, code=1).stderr)
    assert "its SHA-256 is" in text
    assert "Copy it again" in text
    assert text.count("Error:") == 1


@pytest.mark.parametrize("length", [0, 10, 5000, -10])
def test_truncated(run, length):
    path = run / "epoch_0001.pt"
    path.write_bytes(path.read_bytes()[:length])
    (run / "manifest.json").unlink()
    assert "cut short" in words(call(path, code=1).stderr)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_file(tmp_path, form):
    path, canary = tmp_path / "weights.pt", tmp_path / "canary"
    content = {"weight": torch.zeros(3), "state_dict": Canary(canary)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Canary(canary)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert unsafe_names(path) == ["posix.system"]
    text = words(call(path, code=1).stderr)
    assert "could run posix.system" in text
    assert "Nothing was run" in text
    assert not canary.exists()


def test_names_beyond_tensors(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": argparse.Namespace(lr=1), "state_dict": tiny().state_dict()}, path)
    with pytest.raises(UserError, match=r"argparse\.Namespace"):
        inspect_checkpoint(path)
    torch.save(nn.Linear(2, 3), path)
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear"):
        inspect_checkpoint(path)
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), path)
    with pytest.raises(UserError, match="TorchScript"):
        inspect_checkpoint(path)


@pytest.mark.parametrize("key", ["", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_foreign_state_dict(tmp_path, key, legacy):
    from torchvision.models import squeezenet1_1

    path, state = tmp_path / "weights.pth", squeezenet1_1(num_classes=2).state_dict()
    content = {"epoch": 3, key: state} if key else state
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = fields(path)
    assert found["kind"] == "foreign state dict" + (f", under '{key}'" if key else "")
    assert found["tensors"] == f"{len(state)} (float32)"
    assert "--model package.module:factory" in found["to use it"]
    expression = found["to use it"].split("load_state_dict(")[1].split("), in Python")[0]
    assert eval(expression.replace("weights.pth", str(path)), {"torch": torch}).keys() == state.keys()
    assert "foreign state dict" in call(path).stdout


def test_safetensors_and_other_files(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    found = fields(tmp_path / "a.safetensors")
    assert (found["tensors"], found["scalars"]) == ("1", "6")
    assert "safetensors.torch.load_file" in found["to use it"]
    torch.save({"epoch": 1}, tmp_path / "b.pt")
    assert fields(tmp_path / "b.pt")["holds"] == "epoch"
    (tmp_path / "c.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "no checkpoint at all" in words(call(tmp_path / "c.pt", code=1).stderr)


def test_nan_weights(run):
    path = run / "epoch_0002.pt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["4.weight"].fill_(torch.nan)
    content["state_dict"]["4.bias"][0] = torch.inf
    torch.save(content, path)
    (run / "manifest.json").unlink()
    found = fields(path)
    assert found["non-finite"] == "4.weight, 4.bias"
    assert found["manifest"] == "not recorded"


@pytest.mark.parametrize("lost", ["input_quantizer.zero_point", "parametrizations.weight.original"])
def test_quantizers_that_are_not_what_the_checkpoint_says(tiny_runs, tmp_path, lost):
    content = torch.load(tiny_runs / "lsq-w4a4" / "epoch_0002.pt", weights_only=True)
    del content["state_dict"][next(name for name in content["state_dict"] if name.endswith(lost))]
    torch.save(content, tmp_path / "epoch_0002.pt")
    with pytest.raises(UserError, match="other quantizers than it says"):
        inspect_quantizers(tmp_path / "epoch_0002.pt")
