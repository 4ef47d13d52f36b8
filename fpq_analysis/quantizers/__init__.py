"""Quantizers with straight-through gradients, and what turns a float model into a quantized one."""

from fpq_analysis.quantizers.apply import (
    calibrate,
    clipped_fraction,
    fused_quantizers,
    quantize,
    quantizer_parameters,
    quantizers,
)
from fpq_analysis.quantizers.lsq import LSQ
from fpq_analysis.quantizers.spec import QuantSpec
from fpq_analysis.quantizers.views import DEFINITIONS, check_definition, latent_derivatives, variables, view

__all__ = [
    "DEFINITIONS",
    "LSQ",
    "QuantSpec",
    "calibrate",
    "check_definition",
    "clipped_fraction",
    "fused_quantizers",
    "latent_derivatives",
    "quantize",
    "quantizer_parameters",
    "quantizers",
    "variables",
    "view",
]
