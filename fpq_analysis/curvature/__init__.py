"""Curvature of a loss: operators, the exact trace, and a cross-check.  Knows no quantizer."""

from fpq_analysis.curvature.batches import as_batches as as_batches
from fpq_analysis.curvature.certificate import certify as certify
from fpq_analysis.curvature.exact import per_sample_traces as per_sample_traces
from fpq_analysis.curvature.operations import NotExactError as NotExactError
from fpq_analysis.curvature.operator import CurvatureOperator as CurvatureOperator
from fpq_analysis.curvature.operator import FisherOperator as FisherOperator
from fpq_analysis.curvature.operator import GaussNewtonOperator as GaussNewtonOperator
from fpq_analysis.curvature.operator import HessianOperator as HessianOperator
from fpq_analysis.curvature.operator import select as select
from fpq_analysis.curvature.residual import ResidualOperator as ResidualOperator
from fpq_analysis.curvature.samples import check_samples_apart as check_samples_apart
from fpq_analysis.curvature.samples import repeatable as repeatable
from fpq_analysis.curvature.sampling import SampleTraces as SampleTraces
from fpq_analysis.curvature.sampling import exact_traces as exact_traces
from fpq_analysis.curvature.sampling import sampled_traces as sampled_traces
