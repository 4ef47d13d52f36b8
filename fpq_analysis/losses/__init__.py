"""Losses, one a file: means over samples, with what curvature needs to know of each.

A new one is a file with a `Loss`, which every measurement takes as it is (`loss=HUBER`); a row in `table.py` gives it a
name.
"""

from fpq_analysis.losses.binary_cross_entropy import binary_cross_entropy
from fpq_analysis.losses.checks import check_factor, check_mean
from fpq_analysis.losses.combined import combined
from fpq_analysis.losses.cross_entropy import cross_entropy
from fpq_analysis.losses.distillation import distillation
from fpq_analysis.losses.loss import Loss, LossFunction, draw_uniforms
from fpq_analysis.losses.means import by_sample, weighted
from fpq_analysis.losses.table import LOSSES, resolve_loss
from fpq_analysis.losses.tokens import tokens

__all__ = [
    "LOSSES",
    "Loss",
    "LossFunction",
    "binary_cross_entropy",
    "by_sample",
    "check_factor",
    "check_mean",
    "combined",
    "cross_entropy",
    "distillation",
    "draw_uniforms",
    "resolve_loss",
    "tokens",
    "weighted",
]
