"""Folders in which something is damaged, in hundreds of ways: every command names it, goes on, and ends with 0 or 1."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import random
import shutil
import zipfile
from importlib import import_module

import pytest
import torch
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

from fpq_analysis import UserError, files, measure, records
from fpq_analysis.cli import app
from fpq_analysis.data import load_dataset, named
from fpq_analysis.probes import HessianEigs, HessianTrace, hessian_trace
from fpq_analysis.quantizers import calibrate, quantize
from fpq_analysis.runs.checkpoint import read_checkpoint
from fpq_analysis.training import TrainConfig
from fpq_analysis.training import resume as folders

MODEL = "tests.test_hostile:least"
FAST = ["--n-data", "8", "--device", "cpu", "--model", MODEL]
CASES = 250


def least(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """One convolution and a classifier."""
    return nn.Sequential(nn.Conv2d(in_channels, 2, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(8, num_classes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A float run and an LSQ run from it, of two epochs, with constructed weights and records of one measurement."""
    root = tmp_path_factory.mktemp("made")
    digits = load_dataset("digits")
    teacher = None
    for name in ("fp", "lsq"):
        options = {} if name == "fp" else {"method": "lsq", "bits": "W4A4", "init": str(root / "fp")}
        config = TrainConfig(model=MODEL, epochs=1, **options)
        (root / name).mkdir()
        folders.begin(root / name, config, digits, teacher)
        for epoch in (0, 1):
            torch.manual_seed(epoch)
            net = least()
            if config.spec is not None:
                net = quantize(net, config.spec)
                calibrate(net, digits.normalize(digits.train.images[:16]), "minmax")
            optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
            folders.finish_epoch(
                root / name, config, digits, net, optimizer, epoch, {"test_accuracy": 0.5, "seconds": 1.0}
            )
        teacher = read_checkpoint(root / "fp" / "epoch_0001.pt").sha256
    measure(root, HessianTrace(), n_data=8, device="cpu", model=MODEL)
    assert len(records.load(root, "hessian_trace"))
    return root


def call(*arguments):
    """Exit code and all that was printed; never a traceback, nor anything that a terminal would obey."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    told = f"{arguments}: {result.output}{result.exception!r}"
    assert result.exit_code in (0, 1), told
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert "Traceback" not in result.output, told
    assert "fault of the program" not in " ".join(result.output.split()), told
    assert "\x1b" not in result.output, told
    return result.exit_code, " ".join(result.output.split())


ODD = [
    *(
        None,
        True,
        0,
        -1,
        3,
        1.5,
        10**9,
        10**30,
        -(2**63),
        float("nan"),
        float("inf"),
        "",
        "x",
        "W4A4",
        "lsq",
        "\x1b[31mred",
    ),
    *(
        "[red]abc",
        "a[/b]",
        r"$\\frac$",
        "two\nlines",
        "\x00",
        "\ud800",
        "x" * 5000,
        "../..",
        [],
        {},
        [1],
        [None],
        {"a": 1},
    ),
    *([[["deep"]]], {"epoch": None}, [0.5] * 100),
]
NAMES = [
    *(
        "[red]abc",
        "a[/b]",
        "[/]",
        "$\\\\frac$",
        "$x",
        "\x1b[31mred",
        "two\nlines",
        "-rf",
        " blank ",
        "größe",
        "模型",
        "x" * 200,
    ),
    *("%s{0}", "<b>&amp;", "'\"", "\u202eabc", os.fsdecode(b"\xff\xfe"), "a\tb", "#?*", "\\\\", "epoch_0000.pt", "..."),
]
COMMANDS = {
    "hessian": ["--figures", "FIGURES"],
    "gradnorm": ["--figures", "FIGURES", "--batch-size", "4", "--n-draws", "4"],
    "variance": ["--figures", "FIGURES", "--n-draws", "2"],
    "features": ["--figures", "FIGURES", "--epochs", "last"],
    "drift": ["--figures", "FIGURES"],
    "noise": ["--figures", "FIGURES", "--epochs", "last", "--n-draws", "2"],
    "oscillation": ["--figures", "FIGURES"],
    "landscape": ["--figures", "FIGURES", "--dim", "1", "--points", "3"],
    "figures": ["--out", "FIGURES", "--no-measure"],
    "report": ["-o", "FIGURES/report.html"],
    "tables": [],
}
WITHOUT_MODEL = ("tables", "report")
WITHOUT_DATA = ("oscillation",)


def tables_of(value, place=()):
    """Every place in nested lists and dictionaries."""
    for key in list(value) if isinstance(value, dict) else range(min(3, len(value))):
        yield (*place, key)
        if isinstance(value[key], dict | list) and value[key]:
            yield from tables_of(value[key], (*place, key))


def spoil(value, dice):
    """A copy in which one value is another, or is gone."""
    value = copy.deepcopy(value)
    place = dice.choice(list(tables_of(value)))
    at = value
    for key in place[:-1]:
        at = at[key]
    if dice.random() < 0.15 and isinstance(at, dict):
        del at[place[-1]]
    else:
        at[place[-1]] = dice.choice(ODD)
    return value


def odd_tensor(tensor, dice):
    plain = tensor.detach().float().clone()
    return dice.choice(
        [
            lambda: "a string",
            lambda: None,
            lambda: plain.to_sparse(),
            lambda: plain.to("meta"),
            lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
            lambda: plain.to(torch.complex64),
            lambda: plain.half(),
            lambda: plain.int(),
            lambda: plain.bool(),
            lambda: torch.zeros(1).expand(10**9),
            lambda: plain.flatten()[:0],
            lambda: plain[None],
            lambda: plain * torch.nan,
            lambda: plain * 1e30,
            lambda: {"nested": plain},
            lambda: nn.Parameter(plain),
        ]
    )()


def spoil_checkpoint(path, dice):
    """Another value in a checkpoint that its manifest knows nothing of."""
    content = torch.load(path, weights_only=True)
    state = content.pop("state_dict")
    if dice.random() < 0.5:
        name = dice.choice(list(state))
        state[name] = odd_tensor(state[name], dice)
    else:
        content = spoil(content, dice)
    torch.save({**content, "state_dict": state}, path)
    (path.parent / "manifest.json").unlink(missing_ok=True)


def spoil_bytes(path, dice):
    held = bytearray(path.read_bytes())
    at = dice.randrange(len(held))
    how = dice.randrange(5)
    if how == 0:
        for _ in range(dice.choice([1, 1, 100])):
            held[dice.randrange(len(held))] ^= 1 << dice.randrange(8)
    elif how == 1:
        del held[at:]
    elif how == 2:
        held[at:at] = dice.randbytes(dice.choice([1, 10, 1000]))
    elif how == 3:
        del held[at : at + dice.choice([1, 10, 1000])]
    else:
        held = bytearray(dice.choice([b"", b"\x00" * 100, b"{", b"[" * 100_000, b"PK\x03\x04", b"null\n", b"\xff\xfe"]))
    path.write_bytes(bytes(held))
    if dice.random() < 0.5:
        (path.parent / "manifest.json").unlink(missing_ok=True)


def spoil_json(path, dice):
    if path.suffix == ".json":
        path.write_text(json.dumps(spoil(json.loads(path.read_text()), dice)))
        return
    lines = path.read_text().splitlines()
    at = dice.randrange(len(lines))
    lines[at] = json.dumps(spoil(json.loads(lines[at]), dice))
    path.write_text("\n".join(lines) + "\n")


def spoil_place(path, dice):
    """Something else in the file's place."""
    path.unlink()
    dice.choice([path.mkdir, lambda: path.symlink_to(path.name), lambda: path.symlink_to("nowhere"), lambda: None])()


@pytest.fixture
def quick(monkeypatch):
    """What takes most of the time is left out: pixels, the disk's word, reading the data and the options again."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("typer.testing._get_command", functools.cache(get_command))
    monkeypatch.setattr(named, "_digits", functools.cache(named._digits))
    blank = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'
    for place in ("plots.style", "report.pictures"):
        monkeypatch.setattr(import_module(f"fpq_analysis.{place}"), "rendered", lambda *arguments, **options: blank)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("part", range(10))
def test_any_damage_to_any_file(part, made, tmp_path, monkeypatch):
    for case in range(part, CASES, 10):
        dice = random.Random(case)
        root = tmp_path / f"{case}"
        shutil.copytree(made, root)
        run = root / dice.choice(["fp", "lsq"])
        other = root / ("lsq" if run.name == "fp" else "fp")
        files = sorted(path for path in run.rglob("*") if path.is_file())
        kind = case % 5
        if kind == 0:
            path = dice.choice(files)
            spoil_bytes(path, dice)
        elif kind in (1, 2):
            path = dice.choice([path for path in files if path.suffix != ".pt"])
            spoil_json(path, dice)
        elif kind == 3:
            path = dice.choice([path for path in files if path.name.startswith("epoch_")])
            spoil_checkpoint(path, dice)
        elif case % 10 == 4:
            path = dice.choice(files)
            spoil_place(path, dice)
        else:
            path = run.rename(root / dice.choice(NAMES).replace("/", ":"))
            run = path
        shutil.rmtree(other / "records")
        command = list(COMMANDS)[case % len(COMMANDS)]
        places = {"FIGURES": str(tmp_path / "figures"), "FIGURES/report.html": str(tmp_path / "report.html")}
        options = [places.get(option, option) for option in COMMANDS[command]]
        options += [] if command in WITHOUT_MODEL else FAST[2 * (command in WITHOUT_DATA) :]
        call(command, "--ckpt-dir", root, *options, *(["5"] if command == "figures" else []))
        with monkeypatch.context() as undrawn:
            undrawn.setattr("fpq_analysis.cli.measuring.draw", lambda *arguments: [])
            code, text = call("hessian", "--ckpt-dir", root, *FAST)
        assert not code or path.name in text or run.name in text, (case, path, text)
        assert len(records.done(other, "hessian_trace")) == 2, (case, path)
        file = max(run.glob("epoch_*.pt"), default=run) if case % 2 else run
        call(
            *{
                0: ["inspect", "--", file],
                1: ["doctor", *FAST, "--", file],
                2: ["export", "--to", "safetensors", "--model", MODEL, "--", file],
                3: ["compare", *FAST, "--", run, other],
                4: ["train", "--model", MODEL, "--epochs", "1", "--device", "cpu", "--resume", "--out", run],
            }[case // 5 % 5]
        )
        shutil.rmtree(root)


def rewritten(path, change):
    """The checkpoint with a change to what it holds; no manifest knows of it."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    (path.parent / "manifest.json").unlink(missing_ok=True)


CHANGES = {
    "a string in the state": (lambda c: c["state_dict"].update({"0.bias": "x"}), "holds a str under '0.bias'"),
    "a sparse tensor": (lambda c: c["state_dict"].update({"0.bias": torch.zeros(2).to_sparse()}), "a sparse tensor"),
    "a meta tensor": (lambda c: c["state_dict"].update({"0.bias": torch.zeros(2, device="meta")}), "without values"),
    "a huge view": (
        lambda c: c["state_dict"].update({"0.bias": torch.zeros(1).expand(10**10)}),
        "made to fill the memory",
    ),
    "run: null": (lambda c: c.update(run=None), "the field 'run' is None, and must be named fields"),
    "data: null": (lambda c: c.update(data=None), "the field 'data' is None"),
    "half a quant": (lambda c: c.update(quant={"weight_bits": 4}), "it has no field 'quant.act_bits'"),
    "a quant of text": (lambda c: c.update(quant={"weight_bits": "4", "act_bits": 4}), "'quant.weight_bits' is '4'"),
    "many classes": (lambda c: c["model"].update(num_classes=10**9), "'model.num_classes' is 1000000000"),
    "more classes": (lambda c: c["model"].update(num_classes=10**6), "its data have 10"),
    "many channels": (lambda c: c["model"].update(in_channels=4096), "its data have 1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_stopped_all_checkpoints(name, made, tmp_path, monkeypatch):
    """Each was "a fault of the program" without a file's name, and nothing was measured."""
    change, message = CHANGES[name]
    root = shutil.copytree(made, tmp_path / "runs")
    rewritten(root / "fp" / "epoch_0000.pt", change)
    for run in ("fp", "lsq"):
        shutil.rmtree(root / run / "records")
    monkeypatch.setattr("fpq_analysis.cli.measuring.draw", lambda *arguments: [])
    code, text = call("hessian", "--ckpt-dir", root, *FAST)
    assert code == 1
    assert message in text
    assert "epoch_0000.pt" in text
    assert "1 of 4 checkpoints could not be measured" in text
    assert [len(records.done(root / run, "hessian_trace")) for run in ("fp", "lsq")] == [1, 2]


@pytest.mark.parametrize("about", ["null", "[]", "{", '{"config": null}', '{"config": {"epochs": "ten"}}'])
def test_tables_with_a_malformed_run(about, made, tmp_path):
    root = shutil.copytree(made, tmp_path / "runs")
    (root / "fp" / "run.json").write_text(about)
    code, text = call("tables", "--ckpt-dir", root, "--data", "digits")
    assert code == 1
    assert "fp/run.json' is damaged" in text
    assert "Table 4" in text


def test_a_copied_run(made, tmp_path):
    """Two runs with the same keys: Series.__format__ failed."""
    root = shutil.copytree(made, tmp_path / "runs")
    shutil.copytree(root / "lsq", root / "copy")
    code, text = call("hessian", "--ckpt-dir", root, "--figures", tmp_path / "figures", *FAST)
    assert code == 0
    assert text.count("copy") >= 2


def test_archives_that_are_not_what_torch_saves(made, tmp_path):
    """A zip bomb took 1.4 GB before it was refused; it is not unpacked now."""
    root = shutil.copytree(made, tmp_path / "runs")
    path = root / "fp" / "epoch_0001.pt"
    (root / "fp" / "manifest.json").unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    for command in (["inspect"], ["doctor", *FAST], ["export", "--model", MODEL]):
        code, text = call(*command, path)
        assert code == 1
        assert "compressed archive" in text
    torch.jit.save(torch.jit.script(least()), path)
    for command in (["inspect"], ["doctor", *FAST], ["export", "--model", MODEL]):
        code, text = call(*command, path)
        assert code == 1
        assert "TorchScript archive" in text


def test_a_scripted_model():
    scripted = torch.jit.script(least())
    with pytest.raises(UserError, match="TorchScript program"):
        hessian_trace(scripted, (torch.randn(4, 1, 8, 8), torch.arange(4)))


def test_more_eigenvalues_than_products():
    with pytest.raises(UserError, match="at most 1000 are made"):
        HessianEigs(k=100_000)


def test_damage_within_a_measurement_is_measured_again(made, tmp_path):
    """A layer's row that is gone, though the last row stands, was a measurement without that layer."""
    root = shutil.copytree(made, tmp_path / "runs")
    path = root / "fp" / "records" / "hessian_trace.jsonl"
    lines = path.read_text().splitlines()
    whole = records.load(root, "hessian_trace")
    path.write_text("\n".join([lines[0], "x" + lines[1], *lines[2:]]) + "\n")
    assert len(records.done(root / "fp", "hessian_trace")) == 1
    measure(root, HessianTrace(), n_data=8, device="cpu", model=MODEL)
    again = records.load(root, "hessian_trace")
    assert list(again["value"]) == list(whole["value"])


def test_records_are_kept_elsewhere(made, tmp_path, monkeypatch):
    """Checkpoints in a folder that may not be written to: it could not be measured at all."""
    root = shutil.copytree(made, tmp_path / "runs" / "deep")
    for run in ("fp", "lsq"):
        shutil.rmtree(root / run / "records")
    before = sorted(root.rglob("*"))
    write = files.os.fsync

    def refuse(descriptor):
        if str(root) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        write(descriptor)

    monkeypatch.setattr(files.os, "fsync", refuse)
    out = ["--figures", tmp_path / "figures"]
    code, text = call("hessian", "--ckpt-dir", root, *FAST, *out)
    assert code == 1
    assert "Read-only file system" in text
    assert "--records DIR" in text
    for run in ("fp", "lsq"):
        shutil.rmtree(root / run / "records")
    kept = ["--records", tmp_path / "kept"]
    for _ in range(2):
        code, text = call("hessian", "--ckpt-dir", root, *FAST, *out, *kept)
        assert code == 0
    assert "4 done, 0 to do" in text
    assert (tmp_path / "kept" / "fp" / "records" / "hessian_trace.jsonl").is_file()
    assert call("landscape", "--ckpt-dir", root, "--dim", 1, "--points", 3, *FAST, *out, *kept)[0] == 0
    assert call("compare", root / "lsq", root / "fp", *FAST, *kept)[0] == 0
    assert call("figures", "5", "--ckpt-dir", root, "--no-measure", "--out", tmp_path / "figures", *kept)[0] == 0
    code, text = call("report", "--ckpt-dir", root, "-o", tmp_path / "report.html", *kept)
    assert "2 runs; Figure 5" in text
    frame = measure(root, HessianTrace(), n_data=8, device="cpu", model=MODEL, records=tmp_path / "kept")
    assert set(frame["run"]) == {"fp", "lsq"}
    assert sorted(root.rglob("*")) == before
