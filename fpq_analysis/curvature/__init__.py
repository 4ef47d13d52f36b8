"""Curvature of a loss: operators, the exact trace, and a cross-check.  Knows no quantizer."""

from fpq_analysis.curvature.batches import as_batches
from fpq_analysis.curvature.certificate import certify
from fpq_analysis.curvature.exact import per_sample_traces
from fpq_analysis.curvature.graph import NotExactError
from fpq_analysis.curvature.losses import check_mean, check_targets, resolve_loss
from fpq_analysis.curvature.operator import (
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    select,
)
from fpq_analysis.curvature.samples import UnfitError, check_samples_apart, repeatable
from fpq_analysis.curvature.sampling import SampleTraces, exact_traces, sampled_traces

__all__ = [
    "CurvatureOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "NotExactError",
    "SampleTraces",
    "UnfitError",
    "as_batches",
    "certify",
    "check_mean",
    "check_samples_apart",
    "check_targets",
    "exact_traces",
    "per_sample_traces",
    "repeatable",
    "resolve_loss",
    "sampled_traces",
    "select",
]
