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
    from fpq_analysis.inspection import inspect_checkpoint, inspect_run
    from fpq_analysis.measurement import measure
    from fpq_analysis.probes import (
        EigenEstimate,
        HessianDensity,
        HessianEigs,
        HessianTrace,
        NoiseResponse,
        Oscillation,
        Sharpness,
        TraceEstimate,
        hessian_eigs,
        hessian_trace,
        noise_response,
        oscillation,
        sharpness,
        spectral_density,
    )
    from fpq_analysis.quantizers import QuantSpec, calibrate, quantize
    from fpq_analysis.tables import paper_tables
    from fpq_analysis.training import TrainConfig, run_sweep, train

__version__ = "0.1.0"

_HOMES = {
    "EigenEstimate": "fpq_analysis.probes",
    "HessianDensity": "fpq_analysis.probes",
    "HessianEigs": "fpq_analysis.probes",
    "HessianTrace": "fpq_analysis.probes",
    "NoiseResponse": "fpq_analysis.probes",
    "Oscillation": "fpq_analysis.probes",
    "QuantSpec": "fpq_analysis.quantizers",
    "Sharpness": "fpq_analysis.probes",
    "TraceEstimate": "fpq_analysis.probes",
    "TrainConfig": "fpq_analysis.training",
    "UserError": "fpq_analysis.errors",
    "calibrate": "fpq_analysis.quantizers",
    "diagnose": "fpq_analysis.doctor",
    "export_onnx": "fpq_analysis.export",
    "export_safetensors": "fpq_analysis.export",
    "forecast_measurements": "fpq_analysis.doctor",
    "hessian_eigs": "fpq_analysis.probes",
    "hessian_trace": "fpq_analysis.probes",
    "inspect_checkpoint": "fpq_analysis.inspection",
    "inspect_run": "fpq_analysis.inspection",
    "load": "fpq_analysis.checkpoint",
    "measure": "fpq_analysis.measurement",
    "noise_response": "fpq_analysis.probes",
    "oscillation": "fpq_analysis.probes",
    "paper_tables": "fpq_analysis.tables",
    "quantize": "fpq_analysis.quantizers",
    "run_sweep": "fpq_analysis.training",
    "sharpness": "fpq_analysis.probes",
    "spectral_density": "fpq_analysis.probes",
    "train": "fpq_analysis.training",
}

__all__ = [
    "EigenEstimate",
    "HessianDensity",
    "HessianEigs",
    "HessianTrace",
    "NoiseResponse",
    "Oscillation",
    "QuantSpec",
    "Sharpness",
    "TraceEstimate",
    "TrainConfig",
    "UserError",
    "calibrate",
    "diagnose",
    "export_onnx",
    "export_safetensors",
    "forecast_measurements",
    "hessian_eigs",
    "hessian_trace",
    "inspect_checkpoint",
    "inspect_run",
    "load",
    "measure",
    "noise_response",
    "oscillation",
    "paper_tables",
    "quantize",
    "run_sweep",
    "sharpness",
    "spectral_density",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
