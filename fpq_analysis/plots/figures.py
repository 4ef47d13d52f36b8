"""All figures by name, as the rows of `measures.py` list them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fpq_analysis.measures import MEASURES, Picture
from fpq_analysis.methods import load_class
from fpq_analysis.plots.style import save


@dataclass(frozen=True)
class Drawing:
    """One figure of the catalogue, and the measurement it is drawn from.

    Attributes:
        picture: its entry in the catalogue.
        probe: whose records it is drawn from.
        command: of `fpq-analyze`, that measures it.
    """

    picture: Picture
    probe: str
    command: str

    @property
    def title(self) -> str:
        """What a reader calls it."""
        return self.picture.title

    def draw(self, records: pd.DataFrame) -> Figure:
        """The figure; raises `NothingToDraw` if the records hold nothing to draw."""
        figure: Figure = load_class(f"fpq_analysis.plots.{self.picture.draw}")(records)
        return figure

    def caption(self, records: pd.DataFrame) -> str:
        """What a reader must know beside it."""
        return str(load_class(f"fpq_analysis.plots.{self.picture.caption}")(records))

    def write(self, records: pd.DataFrame, folder: Path) -> list[Path]:
        """Draw records into `folder`: the paths of .png, .pdf and, the caption, .txt.

        Raises:
            NothingToDraw: if there is nothing to draw.
        """
        return save(self.draw(records), folder / self.picture.file, self.caption(records))


# The paper's figures by their number, others by name.
FIGURES = {
    picture.key: Drawing(picture, name, row.command) for name, row in MEASURES.items() for picture in row.pictures
}
