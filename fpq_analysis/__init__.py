"""Loss-landscape and Hessian analysis of quantized networks, with a compact trainer for FPQ and its baselines.

Names are imported when they are first used, so that the command line answers without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpq_analysis.checkpoint import load
    from fpq_analysis.doctor import diagnose, forecast_measurements
    from fpq_analysis.errors import UserError
    from fpq_analysis.export import export_onnx, export_safetensors
    from fpq_analysis.foreign import ForeignRuns
    from fpq_analysis.inspection import inspect_checkpoint, inspect_run
    from fpq_analysis.pipeline.figures import draw_figures
    from fpq_analysis.pipeline.landscapes import measure_landscapes
    from fpq_analysis.pipeline.measurement import measure
    from fpq_analysis.probes import (
        Drift,
        EigenEstimate,
        FeatureDrift,
        Features,
        FeatureStatistics,
        GradNorm,
        HessianDensity,
        HessianEigs,
        HessianTrace,
        NoiseResponse,
        Oscillation,
        OutputVariance,
        Sharpness,
        TraceEstimate,
        feature_drift,
        feature_statistics,
        gradient_norms,
        hessian_eigs,
        hessian_trace,
        noise_response,
        oscillation,
        output_variance,
        sharpness,
        spectral_density,
    )
    from fpq_analysis.probes.landscape import Landscape, Recipe, landscape
    from fpq_analysis.quantizers import QuantSpec, calibrate, quantize
    from fpq_analysis.report import write_report
    from fpq_analysis.tables import paper_tables
    from fpq_analysis.training import TrainConfig, run_sweep, train

__version__ = "0.1.0"

_HOMES = {
    "Drift": "fpq_analysis.probes",
    "EigenEstimate": "fpq_analysis.probes",
    "GradNorm": "fpq_analysis.probes",
    "FeatureDrift": "fpq_analysis.probes",
    "FeatureStatistics": "fpq_analysis.probes",
    "Features": "fpq_analysis.probes",
    "ForeignRuns": "fpq_analysis.foreign",
    "HessianDensity": "fpq_analysis.probes",
    "HessianEigs": "fpq_analysis.probes",
    "HessianTrace": "fpq_analysis.probes",
    "OutputVariance": "fpq_analysis.probes",
    "Landscape": "fpq_analysis.probes.landscape",
    "NoiseResponse": "fpq_analysis.probes",
    "Oscillation": "fpq_analysis.probes",
    "QuantSpec": "fpq_analysis.quantizers",
    "Recipe": "fpq_analysis.probes.landscape",
    "Sharpness": "fpq_analysis.probes",
    "TraceEstimate": "fpq_analysis.probes",
    "TrainConfig": "fpq_analysis.training",
    "UserError": "fpq_analysis.errors",
    "calibrate": "fpq_analysis.quantizers",
    "diagnose": "fpq_analysis.doctor",
    "draw_figures": "fpq_analysis.pipeline.figures",
    "export_onnx": "fpq_analysis.export",
    "export_safetensors": "fpq_analysis.export",
    "feature_drift": "fpq_analysis.probes",
    "feature_statistics": "fpq_analysis.probes",
    "forecast_measurements": "fpq_analysis.doctor",
    "gradient_norms": "fpq_analysis.probes",
    "hessian_eigs": "fpq_analysis.probes",
    "hessian_trace": "fpq_analysis.probes",
    "inspect_checkpoint": "fpq_analysis.inspection",
    "inspect_run": "fpq_analysis.inspection",
    "landscape": "fpq_analysis.probes.landscape",
    "load": "fpq_analysis.checkpoint",
    "measure": "fpq_analysis.pipeline.measurement",
    "output_variance": "fpq_analysis.probes",
    "measure_landscapes": "fpq_analysis.pipeline.landscapes",
    "noise_response": "fpq_analysis.probes",
    "oscillation": "fpq_analysis.probes",
    "paper_tables": "fpq_analysis.tables",
    "quantize": "fpq_analysis.quantizers",
    "run_sweep": "fpq_analysis.training",
    "sharpness": "fpq_analysis.probes",
    "spectral_density": "fpq_analysis.probes",
    "train": "fpq_analysis.training",
    "write_report": "fpq_analysis.report",
}

__all__ = [
    "Drift",
    "EigenEstimate",
    "FeatureDrift",
    "FeatureStatistics",
    "Features",
    "ForeignRuns",
    "GradNorm",
    "HessianDensity",
    "HessianEigs",
    "HessianTrace",
    "Landscape",
    "NoiseResponse",
    "Oscillation",
    "OutputVariance",
    "QuantSpec",
    "Recipe",
    "Sharpness",
    "TraceEstimate",
    "TrainConfig",
    "UserError",
    "calibrate",
    "diagnose",
    "draw_figures",
    "export_onnx",
    "export_safetensors",
    "feature_drift",
    "feature_statistics",
    "forecast_measurements",
    "gradient_norms",
    "hessian_eigs",
    "hessian_trace",
    "inspect_checkpoint",
    "inspect_run",
    "landscape",
    "load",
    "measure",
    "measure_landscapes",
    "noise_response",
    "oscillation",
    "output_variance",
    "paper_tables",
    "quantize",
    "run_sweep",
    "sharpness",
    "spectral_density",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
