"""Figures: each is a function from a table of records to a matplotlib `Figure`.  No torch in this room."""

from fpq_analysis.plots.figure5 import caption5, figure5
from fpq_analysis.plots.style import save, style

__all__ = ["caption5", "figure5", "save", "style"]
