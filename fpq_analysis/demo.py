"""The main job end to end on the embedded digits, small enough for two cores and a few minutes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fpq_analysis.measurement import measure
from fpq_analysis.probes import HessianTrace
from fpq_analysis.training import TrainConfig, train

BITS = ("W4A4", "W2A4")
METHODS = ("lsq", "fpq")


def configs(out: Path) -> dict[str, TrainConfig]:
    """Run name to config: the float teacher, then every method at every width from it."""
    runs = {"fp": TrainConfig(epochs=12, lr=0.1, batch_size=128)}
    for bits in BITS:
        for method in METHODS:
            # The paper's learning rate; a smaller batch and fewer epochs, for 1,442 images.
            runs[f"{method}-{bits.lower()}"] = TrainConfig(
                method=method, bits=bits, init=str(out / "fp"), epochs=10, lr=0.01, batch_size=128
            )
    return runs


def run_demo(out: str | Path, *, device: str = "auto", log: Callable[[str], None] = print) -> pd.DataFrame:
    """Train what is missing below `out`, measure the trace of every checkpoint, and return the records."""
    out = Path(out)
    for name, config in configs(out).items():
        train(config, out / name, device=device, resume=True, log=log)
    log("Measuring the Hessian trace of every checkpoint ...")
    return measure(out, HessianTrace(), device=device)
