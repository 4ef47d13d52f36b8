"""Losses, one a file: means over samples, with what curvature needs to know of each.

A new one is a file with a `Loss`, which every measurement takes as it is (`loss=HUBER`); a row in `table.py` gives it a
name.
"""

from fpq_analysis.losses.checks import check_factor, check_mean
from fpq_analysis.losses.loss import Loss, LossFunction, draw_uniforms
from fpq_analysis.losses.table import LOSSES, resolve_loss

__all__ = ["LOSSES", "Loss", "LossFunction", "check_factor", "check_mean", "draw_uniforms", "resolve_loss"]
