"""The main job end to end on the embedded digits, small enough for two cores and a few minutes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fpq_analysis.pipeline.figures import draw_figures
from fpq_analysis.pipeline.run import measure, measure_landscapes
from fpq_analysis.probes import Features, GradNorm, HessianTrace, OutputVariance
from fpq_analysis.probes.landscape import LandscapeSettings
from fpq_analysis.report.page import write_report
from fpq_analysis.training import TrainConfig, train

BITS = ("W4A4", "W2A4")
COMPARED = ("lsq", "fpq")
LANDSCAPE = LandscapeSettings(points=15)


def configs(out: Path) -> dict[str, TrainConfig]:
    """Run name to config: the float teacher, then every method at every width from it."""
    runs = {"fp": TrainConfig(epochs=12, lr=0.1, batch_size=128)}
    for bits in BITS:
        for method in COMPARED:
            # The paper's learning rate; a smaller batch and fewer epochs, for 1,442 images.
            runs[f"{method}-{bits.lower()}"] = TrainConfig(
                method=method, bits=bits, init=str(out / "fp"), epochs=10, lr=0.01, batch_size=128
            )
    return runs


def run_demo(
    out: str | Path,
    figures: str | Path = "figures",
    report: str | Path = "report.html",
    *,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Train what is missing below `out`, measure, draw the figures, and write the report.

    Returns:
        The records of the Hessian trace.
    """
    out = Path(out)
    for name, config in configs(out).items():
        train(config, out / name, device=device, resume=True, log=log)
    log("Measuring ...")
    traces = measure(out, HessianTrace(), device=device)
    measure(out, OutputVariance(), epochs="last", device=device)
    measure(out, Features(), epochs="last", device=device)
    for bits in BITS:  # the figure is of these runs
        measure(out / f"lsq-{bits.lower()}", GradNorm(), device=device)
    for method in COMPARED:
        measure_landscapes(out / f"{method}-w2a4", LANDSCAPE, n_data=256, device=device)
    draw_figures(out, out=figures, measure=False, log=log)
    write_report(out, report)
    log(f"Report: {report}")
    return traces
