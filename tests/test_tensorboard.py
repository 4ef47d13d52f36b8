"""A training's scalars for TensorBoard are its rows, whole after a stop."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from fpq_analysis.cli import app
from fpq_analysis.errors import UserError
from fpq_analysis.runs import Run
from fpq_analysis.training import TrainConfig, loop, train
from fpq_analysis.training import tensorboard as board

CONFIG = TrainConfig(model="tests.nets:tiny", batch_size=512, epochs=2, lr=0.05)
ROW = {
    "epoch": 3,
    "loss": 2.0,
    "loss_ce": 0.5,
    "loss_csd": 1.5,
    "train_accuracy": 0.25,
    "test_accuracy": 0.5,
    "lr": 0.1,
    "seconds": 2,
    "step_sizes": {"conv": 0.1},
}


@pytest.fixture
def written(monkeypatch):
    """What is written, in the place of TensorBoard: (tag, value, epoch)."""
    found = []

    class Writer:
        def __init__(self, folder: str) -> None:
            found.clear()

        def add_scalar(self, *numbers) -> None:
            found.append(numbers)

        def flush(self) -> None: ...

        def close(self) -> None: ...

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(board, "find_spec", lambda name: SimpleNamespace(name=name))
    return found


def test_names_group_what_is_alike():
    assert dict(board.scalars(ROW)) == {
        "loss/all": 2.0,
        "loss/ce": 0.5,
        "loss/csd": 1.5,
        "accuracy/train": 0.25,
        "accuracy/test": 0.5,
        "lr": 0.1,
        "seconds": 2,
    }


def of_rows(run) -> list[tuple[str, float, int]]:
    return [(tag, value, row["epoch"]) for row in Run(run).rows for tag, value in board.scalars(row)]


def test_a_run_that_was_stopped_is_whole_in_the_end(written, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, run, device="cpu", tensorboard=True, log=stop)
    train(CONFIG, run, device="cpu", tensorboard=True, resume=True, log=lambda line: None)
    assert {epoch for *_, epoch in written} == {0, 1, 2}
    assert written == of_rows(run)
    before = list(written)
    monkeypatch.setattr(loop, "_train_epoch", None)
    train(CONFIG, run, device="cpu", tensorboard=True, resume=True, log=lambda line: None)  # finished
    assert written == before


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fpq-analysis\[tensorboard\]'"):
        train(CONFIG, tmp_path / "run", device="cpu", tensorboard=True)
    assert not (tmp_path / "run").exists()
    told = CliRunner().invoke(app, ["train", "--tensorboard", "--out", str(tmp_path / "run")])
    assert told.exit_code == 1
    assert "fpq-analysis[tensorboard]" in told.stderr


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs TensorBoard")
def test_tensorboard_reads_the_rows(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # begun anew, nothing is there twice
        train(CONFIG, tmp_path, device="cpu", tensorboard=True, overwrite=True, log=lambda line: None)
    seen = EventAccumulator(str(tmp_path)).Reload()
    for tag in seen.Tags()["scalars"]:
        for event in seen.Scalars(tag):
            row = dict(board.scalars(Run(tmp_path).rows[event.step]))
            assert event.value == pytest.approx(row[tag], rel=1e-6)
    assert [event.step for event in seen.Scalars("accuracy/test")] == [0, 1, 2]
