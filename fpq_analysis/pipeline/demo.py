"""The main job end to end on the embedded digits, small enough for two cores and a few minutes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fpq_analysis.pipeline.figures import draw_figures
from fpq_analysis.pipeline.run import measure, measure_landscapes
from fpq_analysis.probes import Features, GradNorm, HessianDensity, HessianEigs, HessianTrace, OutputVariance
from fpq_analysis.probes.landscape import LandscapeSettings
from fpq_analysis.report.page import write_report
from fpq_analysis.training import TrainConfig, train

BITS = ("W4A4", "W2A4")
COMPARED = ("lsq", "fpq")
LANDSCAPE = LandscapeSettings(points=15)
# Eigenvalues take about ten products with the Hessian for each network, densities ninety: on few images.
EIGENVALUES, DENSITY, FEW = HessianEigs(k=3), HessianDensity(n_draws=3, n_steps=30), 256
ENDS = "0,10,12"  # first and last epochs


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
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Train what is missing below `out`, measure, draw the figures, and write the report.

    Returns:
        The records of the Hessian's trace at every epoch; of its largest eigenvalues at each run's first and last; of
        its spectral density at the last of the runs of fewest bits.
    """
    out = Path(out)
    for name, config in configs(out).items():
        train(config, out / name, device=device, resume=True, log=log)
    log("Measuring ...")
    traces = measure(out, HessianTrace(), device=device)
    measure(out, OutputVariance(), epochs="last", device=device)
    measure(out, Features(), epochs="last", device=device)
    eigenvalues = measure(out, EIGENVALUES, epochs=ENDS, n_data=FEW, device=device)
    densities = []
    for bits in BITS:  # the figure is of these runs
        measure(out / f"lsq-{bits.lower()}", GradNorm(), device=device)
    for method in COMPARED:
        densities.append(measure(out / f"{method}-w2a4", DENSITY, epochs="last", n_data=FEW, device=device))
        measure_landscapes(out / f"{method}-w2a4", LANDSCAPE, n_data=FEW, device=device)
    draw_figures(out, out=figures, measure=False, log=log)
    write_report(out, report)
    log(f"Report: {report}")
    return traces, eigenvalues, pd.concat(densities, ignore_index=True)
