"""What is on disk survives kills, full disks and flipped bits."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpq_analysis import UserError, load
from fpq_analysis.files import append_jsonl, atomic_write, read_jsonl
from fpq_analysis.models import MODELS, build_model
from fpq_analysis.runs import Run, find_runs
from fpq_analysis.runs.checkpoint import load_tensors, read_checkpoint, save_checkpoint
from fpq_analysis.runs.inspection import inspect_checkpoint


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_keeps_the_old_checkpoint(tiny_runs, tmp_path):
    """A limit on file size stands in for the full disk; plain torch.save destroys the old file there."""
    run = tmp_path / "run"
    shutil.copytree(tiny_runs / "fp", run)
    before = read_checkpoint(run / "epoch_0002.pt").sha256
    code = f"""
import pathlib, resource, signal, torch
from fpq_analysis.runs.checkpoint import load_tensors, read_checkpoint, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, {resource.RLIM_INFINITY}))
save_checkpoint(pathlib.Path({str(run)!r}), {{"epoch": 2, "state_dict": {{"w": torch.zeros(10000)}}}})
"""
    child = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert child.returncode != 0
    assert "File too large" in child.stderr
    assert read_checkpoint(run / "epoch_0002.pt").sha256 == before
    assert not [name for name in os.listdir(run) if name.endswith(".part")]


@pytest.mark.parametrize(
    "write", [lambda p: atomic_write(p, lambda file: file.write(b"x")), lambda p: append_jsonl(p, [{}])]
)
@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENOSPC, "Make room"), (errno.EROFS, "another place"), (errno.EACCES, "another place"), (errno.EIO, "disk")],
)
def test_what_the_machine_refuses_has_a_name(write, number, cure, tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=cure) as caught:
        write(tmp_path / "new" / "a.jsonl")
    assert str(tmp_path / "new" / "a.jsonl") in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert all(path.stat().st_size == 0 for path in (tmp_path / "new").iterdir())


def test_a_file_in_place_of_a_folder_has_a_name(tmp_path):
    (tmp_path / "records").write_text("")
    with pytest.raises(UserError, match="A file stands where a folder is wanted"):
        append_jsonl(tmp_path / "records" / "a.jsonl", [{}])
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"/a' cannot be written: Is a directory\. A file stands where"):
        atomic_write(tmp_path / "a", lambda file: file.write(b"x"))
    with pytest.raises(UserError, match="shorter name"):
        atomic_write(tmp_path / ("a" * 300), lambda file: file.write(b"x"))
    longest = tmp_path / ("a" * 255)
    atomic_write(longest, lambda file: file.write(b"x"))
    assert longest.read_bytes() == b"x"


def test_a_full_disk_takes_no_half_measurement(tmp_path):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, [{"row": 1}])
    before = path.read_bytes()
    code = f"""
import pathlib, resource, signal
from fpq_analysis.files import append_jsonl
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, {resource.RLIM_INFINITY}))
append_jsonl(pathlib.Path({str(path)!r}), [{{"row": "x" * 100}}] * 100)
"""
    child = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "UserError" in child.stderr
    assert "ulimit -f" in child.stderr
    assert path.read_bytes() == before


def test_file_rights_are_the_usual_ones(tmp_path):
    atomic_write(tmp_path / "a", lambda file: file.write(b"x"))
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text())), st.integers(0, 200))
@settings(max_examples=50)
def test_a_torn_line_costs_only_itself(tmp_path_factory, rows, torn):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    append_jsonl(path, rows)
    assert read_jsonl(path) == rows
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - torn)])
    kept = read_jsonl(path)
    assert kept == rows[: len(kept)]
    append_jsonl(path, [{"new": 1}])
    assert read_jsonl(path)[: len(kept)] == kept
    assert read_jsonl(path)[-1] == {"new": 1}


@given(st.data())
@settings(max_examples=30)
def test_any_damage_is_found(tiny_runs, tmp_path_factory, data):
    """A flipped bit loads silently in torch; only the hash tells."""
    run = tmp_path_factory.mktemp("run")
    for name in ("epoch_0001.pt", "manifest.json"):
        shutil.copy(tiny_runs / "fp" / name, run / name)
    path = run / "epoch_0001.pt"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)


def test_truncated_without_a_manifest(tiny_runs, tmp_path):
    content = (tiny_runs / "fp" / "epoch_0001.pt").read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 10):
        (tmp_path / "epoch_0001.pt").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut short or damaged|run code"):
            read_checkpoint(tmp_path / "epoch_0001.pt")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_no_code_runs_from_a_checkpoint(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"format": 1, "state_dict": Canary(canary)}, tmp_path / "epoch_0000.pt")
    with pytest.raises(UserError, match="Nothing was run"):
        read_checkpoint(tmp_path / "epoch_0000.pt")
    assert not canary.exists()


def test_a_checkpoint_does_not_choose_what_is_imported(tiny_runs):
    with pytest.raises(UserError, match="--model tests.nets:tiny"):
        load(tiny_runs / "fp" / "epoch_0002.pt")
    assert not load(tiny_runs / "fp" / "epoch_0002.pt", model="tests.nets:tiny").training


def test_another_architecture_names_both(tiny_runs):
    with pytest.raises(UserError, match=r"'tests.nets:tiny' and does not fit the model 'resnet20'"):
        load(tiny_runs / "fp" / "epoch_0002.pt", model="resnet20")


def test_nan_weights_are_named(tiny_runs, tmp_path):
    content = torch.load(tiny_runs / "fp" / "epoch_0002.pt", weights_only=True)
    content["state_dict"]["3.weight"][0] = torch.nan
    torch.save(content, tmp_path / "epoch_0002.pt")
    with pytest.raises(UserError, match=r"NaN or infinity in 1 of .*3\.weight"):
        load(tmp_path / "epoch_0002.pt", model="tests.nets:tiny")


def test_other_files_are_not_ours(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a checkpoint written by fpq-analyze"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(UserError, match="No checkpoint"):
        read_checkpoint(tmp_path / "b.pt")
    torch.save(
        {"format": 99, **dict.fromkeys(("epoch", "model", "quant", "data", "run", "state_dict"))}, tmp_path / "c.pt"
    )
    with pytest.raises(UserError, match="format 99"):
        read_checkpoint(tmp_path / "c.pt")


def test_finding_runs(tiny_runs, tmp_path):
    assert [run.name for run in find_runs(tiny_runs)] == ["fp", "fpq-w4a4", "lsq-w4a4"]
    assert find_runs(tiny_runs / "fp") == [tiny_runs / "fp"]
    with pytest.raises(UserError, match="No folder"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoints"):
        find_runs(tmp_path)


def test_manifest_follows_the_files(tiny_runs, tmp_path):
    content = torch.load(tiny_runs / "fp" / "epoch_0002.pt", weights_only=True)
    del content["format"]
    save_checkpoint(tmp_path, content)
    (path,) = Run(tmp_path).checkpoints.values()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    stat = path.stat()
    about = {"sha256": read_checkpoint(path).sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    assert manifest == {path.name: about}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet2", "did you mean 'resnet20'"),
        ("no.such:thing", "Cannot import"),
        ("tests.nets:nothing", "Cannot import"),
        ("tests.nets:OUTSIDE", "not a function"),
        ("tests.nets:dense_hessian", "failed: TypeError"),
        ("fractions:Fraction", "not a torch.nn.Module"),
    ],
)
def test_bad_model_names(name, message):
    with pytest.raises(UserError, match=message):
        build_model(name, 10, 3)


def test_models_fit_any_small_image():
    published = {
        "resnet18": 11.17e6,
        "resnet20": 0.27e6,
        "resnet50": 23.52e6,
        "mobilenet_v1": 3.22e6,
        "mobilenet_v2": 2.24e6,
    }
    assert published.keys() == MODELS.keys()
    for name, parameters in published.items():
        model = build_model(name, 10, 3).eval()
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
        for size in (8, 28, 32):
            assert build_model(name, 7, 1).eval()(torch.randn(2, 1, size, size)).shape == (2, 7)


@given(st.data())
@settings(max_examples=60)
def test_a_flipped_bit_is_found_without_a_manifest(tiny_runs, tmp_path_factory, data):
    """By the archive's own checksums: torch does not look at them, and measured 706.4 for 871.6."""
    path = tmp_path_factory.mktemp("run") / "epoch_0001.pt"
    content = bytearray((tiny_runs / "fp" / "epoch_0001.pt").read_bytes())
    truth = torch.load(tiny_runs / "fp" / "epoch_0001.pt")["state_dict"]
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = read_checkpoint(path).state_dict
    except UserError:
        return
    assert all(torch.equal(found[key], tensor) for key, tensor in truth.items())  # between the parts


def test_the_damaged_part_is_named(tiny_runs, tmp_path):
    content = torch.load(tiny_runs / "fp" / "epoch_0001.pt")["state_dict"]
    torch.save(content, tmp_path / "epoch_1.pt")
    written = bytearray((tmp_path / "epoch_1.pt").read_bytes())
    weight = content["11.weight"].numpy().tobytes()
    place = written.index(weight) + len(weight) // 2
    written[place] ^= 64
    (tmp_path / "epoch_1.pt").write_bytes(written)
    for read in (load_tensors, inspect_checkpoint):
        with pytest.raises(UserError, match=r"damaged: its part '.*data/\d+' has not the checksum"):
            read(tmp_path / "epoch_1.pt")


@pytest.mark.parametrize("form", ["archive", "no checksums", "legacy", "safetensors"])
def test_files_say_whether_they_are_known_to_be_intact(tmp_path, form):
    state, path = {"w": torch.ones(3)}, tmp_path / "epoch_1.pt"
    if form == "safetensors":
        path = tmp_path / "epoch_1.safetensors"
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.serialization.set_crc32_options(form != "no checksums")
        try:
            torch.save(state, path, _use_new_zipfile_serialization=form != "legacy")
        finally:
            torch.serialization.set_crc32_options(True)
        assert torch.equal(load_tensors(path)["w"], state["w"])
    intact = inspect_checkpoint(path).set_index("field")["value"]["intact"]
    assert intact.startswith("yes" if form == "archive" else "not known: it holds no checksums")
