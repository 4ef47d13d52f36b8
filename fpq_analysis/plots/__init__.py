"""Figures: each is a function from a table of records to a matplotlib `Figure`.  No torch in this room."""

from fpq_analysis.plots.density import density_caption, density_figure
from fpq_analysis.plots.drift import drift_caption, drift_figure, drift_layer_figure
from fpq_analysis.plots.eigenvalues import eigenvalue_caption, eigenvalue_figure
from fpq_analysis.plots.figure1 import caption1, figure1
from fpq_analysis.plots.figure2 import caption2, figure2
from fpq_analysis.plots.figure3 import caption3, figure3
from fpq_analysis.plots.figure4 import caption4, figure4
from fpq_analysis.plots.figure5 import caption5, figure5
from fpq_analysis.plots.figures import FIGURES, Drawing
from fpq_analysis.plots.landscape import landscape_caption, landscape_figure, surface_figure
from fpq_analysis.plots.noise import noise_caption, noise_figure
from fpq_analysis.plots.oscillation import oscillation_caption, oscillation_figure
from fpq_analysis.plots.single import layer_figure, single_figure
from fpq_analysis.plots.style import save, style
from fpq_analysis.plots.training import training_caption, training_figure

__all__ = [
    "FIGURES",
    "Drawing",
    "caption1",
    "caption2",
    "caption3",
    "caption4",
    "caption5",
    "density_caption",
    "density_figure",
    "drift_caption",
    "drift_figure",
    "drift_layer_figure",
    "eigenvalue_caption",
    "eigenvalue_figure",
    "figure1",
    "figure2",
    "figure3",
    "figure4",
    "figure5",
    "landscape_caption",
    "landscape_figure",
    "layer_figure",
    "noise_caption",
    "noise_figure",
    "oscillation_caption",
    "oscillation_figure",
    "save",
    "single_figure",
    "style",
    "surface_figure",
    "training_caption",
    "training_figure",
]
