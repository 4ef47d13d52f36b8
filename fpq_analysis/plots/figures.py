"""All figures by name.  A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from fpq_analysis.plots.density import density_caption, density_figure
from fpq_analysis.plots.eigenvalues import eigenvalue_caption, eigenvalue_figure
from fpq_analysis.plots.figure5 import caption5, figure5
from fpq_analysis.plots.noise import noise_caption, noise_figure
from fpq_analysis.plots.oscillation import oscillation_caption, oscillation_figure


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        title: what it is called.
        file: name of its files, without suffix.
        probe: whose records it is drawn from.
        draw: from these records; raises `ValueError` if there is nothing to draw.
        caption: what a reader must know beside it, from the same records.
    """

    title: str
    file: str
    probe: str
    draw: Callable[[pd.DataFrame], Figure]
    caption: Callable[[pd.DataFrame], str]


# The paper's figures by their number, others by name.
FIGURES = {
    "5": Drawing("Figure 5", "figure5", "hessian_trace", figure5, caption5),
    "eigenvalues": Drawing("Eigenvalues", "eigenvalues", "hessian_eigs", eigenvalue_figure, eigenvalue_caption),
    "density": Drawing("Density", "density", "hessian_density", density_figure, density_caption),
    "noise": Drawing("Noise", "noise", "noise", noise_figure, noise_caption),
    "oscillation": Drawing("Oscillation", "oscillation", "oscillation", oscillation_figure, oscillation_caption),
}
