"""Curvature of a loss: operators, the exact trace, and a cross-check.  Knows no quantizer."""

from fpq_analysis.curvature.batches import as_batches
from fpq_analysis.curvature.certificate import certify
from fpq_analysis.curvature.exact import per_sample_traces
from fpq_analysis.curvature.graph import NotExactError
from fpq_analysis.curvature.operator import (
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    select,
)
from fpq_analysis.curvature.samples import MixedSamplesError, check_samples_apart
from fpq_analysis.curvature.sampling import SampleTraces, exact_traces, sampled_traces

__all__ = [
    "CurvatureOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "MixedSamplesError",
    "NotExactError",
    "SampleTraces",
    "as_batches",
    "certify",
    "check_samples_apart",
    "exact_traces",
    "per_sample_traces",
    "sampled_traces",
    "select",
]
