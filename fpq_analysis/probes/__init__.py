"""Measurements, one a file, all of one shape.  A new one is a new file and a line in `PROBES`."""

from fpq_analysis.probes.density import HessianDensity, spectral_density
from fpq_analysis.probes.eigs import EigenEstimate, HessianEigs, hessian_eigs
from fpq_analysis.probes.noise import NoiseResponse, noise_response
from fpq_analysis.probes.oscillation import Oscillation, oscillation
from fpq_analysis.probes.point import Point, Probe
from fpq_analysis.probes.sharpness import Sharpness, sharpness
from fpq_analysis.probes.trace import HessianTrace, TraceEstimate, hessian_trace

PROBES = {
    probe.name: probe for probe in (HessianTrace, HessianEigs, HessianDensity, Sharpness, NoiseResponse, Oscillation)
}

__all__ = [
    "PROBES",
    "EigenEstimate",
    "HessianDensity",
    "HessianEigs",
    "HessianTrace",
    "NoiseResponse",
    "Oscillation",
    "Point",
    "Probe",
    "Sharpness",
    "TraceEstimate",
    "hessian_eigs",
    "hessian_trace",
    "noise_response",
    "oscillation",
    "sharpness",
    "spectral_density",
]
