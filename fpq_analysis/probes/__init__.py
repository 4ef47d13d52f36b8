"""Measurements, one a file, all of one shape.  A new one is a new file and a line in `PROBES`."""

from fpq_analysis.probes.density import HessianDensity, spectral_density
from fpq_analysis.probes.drift import Drift, FeatureDrift, feature_drift
from fpq_analysis.probes.eigs import EigenEstimate, HessianEigs, hessian_eigs
from fpq_analysis.probes.features import Features, FeatureStatistics, feature_statistics
from fpq_analysis.probes.point import Point, Probe
from fpq_analysis.probes.sharpness import Sharpness, sharpness
from fpq_analysis.probes.trace import HessianTrace, TraceEstimate, hessian_trace

PROBES = {probe.name: probe for probe in (HessianTrace, HessianEigs, HessianDensity, Sharpness, Features, Drift)}

__all__ = [
    "PROBES",
    "Drift",
    "EigenEstimate",
    "FeatureDrift",
    "FeatureStatistics",
    "Features",
    "HessianDensity",
    "HessianEigs",
    "HessianTrace",
    "Point",
    "Probe",
    "Sharpness",
    "TraceEstimate",
    "feature_drift",
    "feature_statistics",
    "hessian_eigs",
    "hessian_trace",
    "sharpness",
    "spectral_density",
]
