"""All figures by name.  A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fpq_analysis.plots.density import density_caption, density_figure
from fpq_analysis.plots.drift import drift_caption, drift_figure, drift_layer_figure
from fpq_analysis.plots.eigenvalues import eigenvalue_caption, eigenvalue_figure
from fpq_analysis.plots.figure1 import caption1, figure1
from fpq_analysis.plots.figure2 import caption2, figure2
from fpq_analysis.plots.figure3 import caption3, figure3
from fpq_analysis.plots.figure4 import caption4, figure4
from fpq_analysis.plots.figure5 import caption5, figure5
from fpq_analysis.plots.landscape import landscape_caption, landscape_figure, surface_figure
from fpq_analysis.plots.noise import noise_caption, noise_figure
from fpq_analysis.plots.oscillation import oscillation_caption, oscillation_figure
from fpq_analysis.plots.style import save


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        title: what it is called.
        file: name of its files, without suffix.
        probe: whose records it is drawn from.
        draw: from these records; raises `NothingToDraw` if there is nothing to draw.
        caption: what a reader must know beside it, from the same records.
        command: of `fpq-analyze`, that measures it.
        last: whether only the last epoch of each run is drawn, so that the others need not be measured for it.
        single: whether it shows a single network as well, outside of any run: then results draw it.
    """

    title: str
    file: str
    probe: str
    draw: Callable[[pd.DataFrame], Figure]
    caption: Callable[[pd.DataFrame], str]
    command: str
    last: bool = False
    single: bool = False

    def write(self, frame: pd.DataFrame, folder: Path) -> list[Path]:
        """Draw records into `folder`: the paths of .png, .pdf and, the caption, .txt.

        Raises:
            NothingToDraw: if there is nothing to draw.
        """
        return save(self.draw(frame), folder / self.file, self.caption(frame))


# The paper's figures by their number, others by name.
FIGURES = {
    "1": Drawing("Figure 1", "figure1", "output_variance", figure1, caption1, "variance", last=True, single=True),
    "2": Drawing("Figure 2", "figure2", "gradnorm", figure2, caption2, "gradnorm"),
    "3": Drawing("Figure 3", "figure3", "features", figure3, caption3, "features", last=True, single=True),
    "4": Drawing("Figure 4", "figure4", "features", figure4, caption4, "features", last=True),
    "5": Drawing("Figure 5", "figure5", "hessian_trace", figure5, caption5, "hessian"),
    "eigenvalues": Drawing(
        "Eigenvalues", "eigenvalues", "hessian_eigs", eigenvalue_figure, eigenvalue_caption, "hessian --top-k 5"
    ),
    "density": Drawing(
        "Density", "density", "hessian_density", density_figure, density_caption, "hessian --density", single=True
    ),
    "landscape": Drawing(
        "Landscape", "landscape", "landscape", landscape_figure, landscape_caption, "landscape", single=True
    ),
    "surface": Drawing("Surface", "surface", "landscape", surface_figure, landscape_caption, "landscape"),
    "drift": Drawing("Drift", "drift", "drift", drift_figure, drift_caption, "drift"),
    "drift_layers": Drawing(
        "Drift by layer", "drift_layers", "drift", drift_layer_figure, drift_caption, "drift", single=True
    ),
    "noise": Drawing("Noise", "noise", "noise", noise_figure, noise_caption, "noise", last=True, single=True),
    "oscillation": Drawing(
        "Oscillation", "oscillation", "oscillation", oscillation_figure, oscillation_caption, "oscillation"
    ),
}
