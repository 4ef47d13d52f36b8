"""Figures: each is a function from a table of records to a matplotlib `Figure`.  No torch in this room."""

from fpq_analysis.plots.density import density_caption, density_figure
from fpq_analysis.plots.eigenvalues import eigenvalue_caption, eigenvalue_figure
from fpq_analysis.plots.figure5 import caption5, figure5
from fpq_analysis.plots.figures import FIGURES, Drawing
from fpq_analysis.plots.noise import noise_caption, noise_figure
from fpq_analysis.plots.oscillation import oscillation_caption, oscillation_figure
from fpq_analysis.plots.style import save, style

__all__ = [
    "FIGURES",
    "Drawing",
    "caption5",
    "density_caption",
    "density_figure",
    "eigenvalue_caption",
    "eigenvalue_figure",
    "figure5",
    "noise_caption",
    "noise_figure",
    "oscillation_caption",
    "oscillation_figure",
    "save",
    "style",
]
