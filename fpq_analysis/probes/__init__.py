"""Measurements, one a file, all of one shape.  A new one is a file here and a row in `measures.py`."""

from fpq_analysis.measures import MEASURES
from fpq_analysis.methods import load_class
from fpq_analysis.probes.density import DensityEstimate, HessianDensity, spectral_density
from fpq_analysis.probes.drift import Drift, FeatureDrift, feature_drift
from fpq_analysis.probes.eigs import EigenEstimate, HessianEigs, hessian_eigs
from fpq_analysis.probes.features import Features, FeatureStatistics, feature_statistics
from fpq_analysis.probes.gradnorm import GradNorm, gradient_norms
from fpq_analysis.probes.noise import NoiseResponse, noise_response
from fpq_analysis.probes.oscillation import Oscillation, oscillation
from fpq_analysis.probes.point import Point, Probe
from fpq_analysis.probes.result import Measurement, Result
from fpq_analysis.probes.sharpness import Sharpness, sharpness
from fpq_analysis.probes.trace import GaussNewtonTrace, HessianTrace, TraceEstimate, hessian_trace
from fpq_analysis.probes.variance import OutputVariance, output_variance

PROBES = {name: load_class(f"fpq_analysis.probes.{row.probe}") for name, row in MEASURES.items() if row.probe}

__all__ = [
    "PROBES",
    "DensityEstimate",
    "Drift",
    "EigenEstimate",
    "FeatureDrift",
    "FeatureStatistics",
    "Features",
    "GaussNewtonTrace",
    "GradNorm",
    "HessianDensity",
    "HessianEigs",
    "HessianTrace",
    "Measurement",
    "NoiseResponse",
    "Oscillation",
    "OutputVariance",
    "Point",
    "Probe",
    "Result",
    "Sharpness",
    "TraceEstimate",
    "feature_drift",
    "feature_statistics",
    "gradient_norms",
    "hessian_eigs",
    "hessian_trace",
    "noise_response",
    "oscillation",
    "output_variance",
    "sharpness",
    "spectral_density",
]
