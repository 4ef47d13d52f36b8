"""All figures by name, as the rows of `measures.py` list them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fpq_analysis.measures import MEASURES
from fpq_analysis.methods import load_class
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
    picture.key: Drawing(
        picture.title,
        picture.file,
        name,
        load_class(f"fpq_analysis.plots.{picture.draw}"),
        load_class(f"fpq_analysis.plots.{picture.caption}"),
        row.command,
        picture.last,
        picture.single,
    )
    for name, row in MEASURES.items()
    for picture in row.pictures
}
