"""Curvature of a loss: operators, the exact trace, and a cross-check.  Knows no quantizer."""

from fpq_analysis.curvature.batches import as_batches
from fpq_analysis.curvature.certificate import certify
from fpq_analysis.curvature.exact import per_sample_traces
from fpq_analysis.curvature.operations import NotExactError
from fpq_analysis.curvature.operator import (
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    select,
)
from fpq_analysis.curvature.samples import check_samples_apart, repeatable
from fpq_analysis.curvature.sampling import SampleTraces, exact_traces, sampled_traces

__all__ = [
    "CurvatureOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "NotExactError",
    "SampleTraces",
    "as_batches",
    "certify",
    "check_samples_apart",
    "exact_traces",
    "per_sample_traces",
    "repeatable",
    "sampled_traces",
    "select",
]
