"""Shared settings: fixed seeds, a folder for every test, no hypothesis deadlines, and a small trained run made once."""

from __future__ import annotations

import os
from pathlib import Path

# The tests' networks are too small to share among threads, and each worker of pytest-xdist wants a core of its own.
# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that tests start run elsewhere, and import the package and `tests.nets` from here.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.getenv("PYTHONPATH")]))

import pytest
import torch
from hypothesis import settings

from fpq_analysis.training import TrainConfig, train
from tests.guard import pytest_configure, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written without a folder's name lands in the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FPQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float run, and an LSQ and an FPQ run from it: digits, a small network, two epochs.  Copy before changing."""
    root = tmp_path_factory.mktemp("runs")
    common = {"model": "tests.nets:tiny", "batch_size": 32, "epochs": 2}
    quiet = lambda line: None  # noqa: E731
    train(TrainConfig(lr=0.1, **common), root / "fp", device="cpu", log=quiet)
    for method in ("lsq", "fpq"):
        config = TrainConfig(method=method, bits="W4A4", init=str(root / "fp"), lr=0.02, **common)
        train(config, root / f"{method}-w4a4", device="cpu", log=quiet)
    return root
