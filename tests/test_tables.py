"""The paper's tables, and what is put beside them."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import asdict

import pytest

from fpq_analysis import TrainConfig, UserError, paper_tables
from fpq_analysis.report.paper import COLUMNS, PAPER
from tests.nets import DIGITS
from tests.test_cli import call
from tests.words import words


def run(root, name, accuracies, **settings):
    """A run as the tables read it: the config, a row an epoch, and empty checkpoints."""
    options = {"data": "cifar10", "model": "resnet18", "epochs": 2, **settings}
    if "method" in options:
        options = {"bits": "W4A4", "init": "fp", **options}
    config = asdict(TrainConfig(**options))
    (root / name).mkdir(parents=True)
    (root / name / "run.json").write_text(json.dumps({"config": config, "data": DIGITS}))
    rows = [{"epoch": epoch, "test_accuracy": value / 100} for epoch, value in enumerate(accuracies)]
    (root / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for epoch in range(len(accuracies)):
        (root / name / f"epoch_{epoch:04d}.pt").touch()


def cell(frame, table, row, model="resnet18", bits="W4A4"):
    found = frame[
        (frame["table"] == table) & (frame["row"] == row) & (frame["model"] == model) & (frame["bits"] == bits)
    ]
    assert len(found) == 1
    return found.iloc[0]


@pytest.fixture
def root(tmp_path):
    for seed, accuracy in enumerate((90.0, 91.0, 93.5)):
        run(tmp_path, f"lsq{seed}", (10, 95, accuracy), method="lsq", seed=seed)
    run(tmp_path, "fp", (10, 80, 88))
    run(tmp_path, "fpq", (10, 80, 89), method="fpq")
    for p in (0.0, 0.3):
        run(tmp_path, f"fpq-{p}", (10, 80, 70 + p), method="fpq", bits="W2A4", sfp_p=p)
    return tmp_path


def test_the_papers_numbers():
    """Those that stand in two tables agree, and sums over columns guard against a slip in typing."""
    assert sum(len(table.rows) * len(table.models) for table in PAPER.values()) == 6 + 4 + 7 + 64 + 64
    values = {
        (n, row, bits, model): x
        for n, t in PAPER.items()
        for row, bits, xs in t.rows
        for model, x in zip(t.models, xs, strict=True)
    }
    for row, bits, model in (("FP", "FP", "resnet18"), ("FPQ", "W4A4", "mobilenet_v2")):
        assert values[1, row, bits, model] == values[4, row, bits, model]
    assert (
        values[2, "+ both", "W2A4", "resnet18"]
        == values[3, "p = 0.1", "W2A4", "resnet18"]
        == (values[4, "FPQ", "W2A4", "resnet18"])
    )
    assert values[2, "+ CSD", "W2A4", "resnet18"] == values[3, "p = 0", "W2A4", "resnet18"]
    assert values[5, "PACT", "W2A2", "resnet50"] == 4.26


def test_mean_and_deviation_over_seeds(root):
    frame = paper_tables(root)
    assert list(frame.columns) == list(COLUMNS)
    lsq = cell(frame, 4, "LSQ")
    assert (lsq["n"], lsq["mean"], lsq["paper"]) == (3, pytest.approx(91.5), 86.69)
    assert lsq["sd"] == pytest.approx(statistics.stdev((90, 91, 93.5)))
    assert lsq["best"] == pytest.approx(95)
    assert cell(frame, 1, "FPQ")["mean"] == pytest.approx(89)
    assert cell(frame, 4, "FP", bits="FP")["mean"] == pytest.approx(88)
    blank = cell(frame, 4, "KD")
    assert blank["n"] == 0
    assert blank[["mean", "sd", "best"]].isna().all()
    assert not (frame["table"] == 5)[frame["n"] > 0].any()


def test_ablations_are_told_apart(root):
    frame = paper_tables(root)
    assert cell(frame, 3, "p = 0", bits="W2A4")["mean"] == cell(frame, 2, "+ CSD", bits="W2A4")["mean"]
    assert cell(frame, 3, "p = 0.3", bits="W2A4")["mean"] == pytest.approx(70.3)
    assert cell(frame, 4, "FPQ", bits="W2A4")["n"] == 0  # neither is the paper's FPQ


def test_runs_of_different_settings_are_not_averaged(root):
    run(root, "longer", (10, 20, 30, 40), method="lsq", epochs=3)
    run(root, "half", (10, 20), method="lsq", seed=9)
    shutil.copytree(root / "lsq0", root / "copies" / "lsq0")
    lsq = cell(paper_tables(root), 4, "LSQ")
    assert (lsq["n"], lsq["epochs"], lsq["left_out"], lsq["unfinished"]) == (3, 2, 1, 1)
    assert lsq["mean"] == pytest.approx(91.5)


def test_other_data_and_networks(tmp_path):
    run(tmp_path, "lsq", (10, 80, 90), method="lsq", data="digits", model="resnet20")
    assert not (paper_tables(tmp_path)["n"] > 0).any()
    frame = paper_tables(tmp_path, data="digits")
    assert cell(frame, 5, "LSQ", model="resnet20")["mean"] == pytest.approx(90)
    assert cell(frame, 5, "LSQ", model="resnet20")["paper"] != cell(frame, 5, "LSQ", model="resnet20")["paper"]
    with pytest.raises(UserError, match="some on digits"):
        paper_tables(tmp_path, data="cifar10")
    with pytest.raises(UserError, match="No folder"):
        paper_tables(tmp_path / "nowhere")


def test_the_command(root):
    for model in ("resnet50", "mobilenet_v1", "mobilenet_v2", "resnet20"):
        for seed in (0, 1):
            run(root, f"{model}{seed}", (10, 80, 89.123 + seed), method="fpq", model=model, seed=seed)
    result = call("tables", "--ckpt-dir", root)
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines), result.stdout
    assert [line for line in lines if line.startswith("Table")] == [
        "Table 1: SAM and FPQ, cifar10, accuracy in %",
        "Table 2: parts of FPQ, cifar10, accuracy in %",
        "Table 3: probability of perturbation, cifar10, accuracy in %",
        "Table 4: all methods, cifar10, accuracy in %",
    ]
    assert "89.62±0.71" in result.stdout
    assert "90.16" in result.stdout
    assert "Res20" in result.stdout
    assert "over seeds (1 to 3 a cell)" in " ".join(result.stdout.split())
    rows = [json.loads(line) for line in call("tables", "--ckpt-dir", root, "--table", 4, "--json").stdout.splitlines()]
    assert {row["table"] for row in rows} == {4}
    assert len(rows) == 16 * 5
    assert "Tables 1 to 5" in words(call("tables", "--ckpt-dir", root, "--table", 6, code=1).stderr)
    assert len(call("tables", "--ckpt-dir", root, "--table", 5).stdout.splitlines()) > 16  # blank, but there
    run(root, "digits", (10, 80, 90), method="lsq", data="digits")
    text = " ".join(call("tables", "--ckpt-dir", root, "--data", "digits").stdout.split())
    assert "Ours in Table 4, 5: trained on digits, not on the paper's data" in text
