"""Curvature of a loss: a Hessian operator, the exact trace, and a cross-check.  Knows no quantizer."""

from fpq_analysis.curvature.batches import as_batches
from fpq_analysis.curvature.certificate import MixedSamplesError, certify, check_samples_apart
from fpq_analysis.curvature.exact import NotExactError, per_sample_traces
from fpq_analysis.curvature.operator import HessianOperator

__all__ = [
    "HessianOperator",
    "MixedSamplesError",
    "NotExactError",
    "as_batches",
    "certify",
    "check_samples_apart",
    "per_sample_traces",
]
