"""Shared settings: fixed seeds, no hypothesis deadlines, and a small trained run made once."""

from __future__ import annotations

import os
from pathlib import Path

# The tests' networks are too small to share among threads, and each worker of pytest-xdist wants a core of its own.
# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from fpq_analysis.training import TrainConfig, train

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
