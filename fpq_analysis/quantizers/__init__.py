"""Quantizers with straight-through gradients, and what turns a float model into a quantized one."""

from fpq_analysis.quantizers.apply import (
    calibrate,
    changed_fraction,
    clipped_fraction,
    fused_quantizers,
    quantize,
    quantizer_parameters,
    quantizers,
    step_sizes,
    stored_quantizers,
    weight_codes,
    weight_quantizers,
)
from fpq_analysis.quantizers.base import Quantizer
from fpq_analysis.quantizers.lsq import LSQ
from fpq_analysis.quantizers.lsq_plus import LSQPlus, SymmetricLSQ
from fpq_analysis.quantizers.noise import FeatureNoise, WeightNoise
from fpq_analysis.quantizers.others import (
    check_definition_applies,
    check_plain,
    live_observer,
    other_quantizers,
    rounded_weight,
    rounds_weights,
)
from fpq_analysis.quantizers.pact import PACT, DoReFa
from fpq_analysis.quantizers.spec import QuantSpec
from fpq_analysis.quantizers.views import DEFINITIONS, check_definition, latent_derivatives, variables, view

__all__ = [
    "DEFINITIONS",
    "LSQ",
    "PACT",
    "DoReFa",
    "FeatureNoise",
    "LSQPlus",
    "QuantSpec",
    "Quantizer",
    "SymmetricLSQ",
    "WeightNoise",
    "calibrate",
    "changed_fraction",
    "check_definition",
    "check_definition_applies",
    "check_plain",
    "clipped_fraction",
    "fused_quantizers",
    "latent_derivatives",
    "live_observer",
    "other_quantizers",
    "quantize",
    "quantizer_parameters",
    "quantizers",
    "rounded_weight",
    "rounds_weights",
    "step_sizes",
    "stored_quantizers",
    "variables",
    "view",
    "weight_codes",
    "weight_quantizers",
]
