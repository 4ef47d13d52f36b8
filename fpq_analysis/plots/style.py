"""One style for all figures: widths, fonts, lines; and writing them to files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fpq_analysis.errors import UserError
from fpq_analysis.files import atomic_write
from fpq_analysis.plots.names import LABELS

WIDTHS = {1: 3.3, 2: 6.9}  # inches of a figure that fills one column of a page, or two
COLUMNS: ContextVar[int] = ContextVar("columns", default=2)


@contextmanager
def look(columns: int = 2, labels: Mapping[str, str] | None = None) -> Iterator[None]:
    """Inside, figures are as wide as so many columns of a page, and call things by the names given.

    Args:
        columns: 1 or 2; see `WIDTHS`.
        labels: what to call data sets, networks, methods and runs, by the names that the records have.

    Raises:
        UserError: if there is no such width.
    """
    if columns not in WIDTHS:
        raise UserError(f"A figure is 1 or 2 columns wide, not {columns}.")
    width, names = COLUMNS.set(columns), LABELS.set(labels or {})
    try:
        yield
    finally:
        COLUMNS.reset(width)
        LABELS.reset(names)


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures are drawn in the project's style; the user's own settings come back afterwards."""
    ours: dict[Any, Any] = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "patch.edgecolor"), "white"),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "0.15"),
        **dict.fromkeys(("axes.grid", "axes.axisbelow", "patch.force_edgecolor"), True),
        **dict.fromkeys(("axes.spines.left", "axes.spines.bottom"), True),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        **dict.fromkeys(("xtick.bottom", "xtick.top", "ytick.left", "ytick.right"), False),
        **dict.fromkeys(("xtick.direction", "ytick.direction"), "out"),
        "axes.edgecolor": "#444444",
        "font.family": ["sans-serif"],
        "font.sans-serif": ["Arial", "DejaVu Sans", "Liberation Sans", "Bitstream Vera Sans", "sans-serif"],
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.linewidth": 0.6,
        **dict.fromkeys(("axes.labelsize", "legend.fontsize"), 7.5),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 7),
        "figure.dpi": 200,
        "grid.color": "#EBEBEB",
        "grid.linewidth": 0.6,
        "grid.linestyle": "-",
        "legend.frameon": False,
        "lines.linewidth": 1.3,
        "lines.markersize": 3.6,
        "lines.markeredgewidth": 0.8,
        "lines.solid_capstyle": "round",
        "pdf.fonttype": 42,  # text stays text in PDF
        "svg.fonttype": "none",
        "text.parse_math": False,  # names of runs, layers and the like are text, with or without a dollar
        "savefig.bbox": None,  # as wide as a column, to the point
        "savefig.dpi": "figure",
        "hatch.linewidth": 0.7,
        "hatch.color": "white",
    }
    with mpl.rc_context(ours):
        yield


def save(figure: Figure, path: str | Path, caption: str) -> list[Path]:
    """Write `path` with the suffixes .png and .pdf, and its caption as .txt; returns the three paths.

    All is drawn before anything is written, and each file is replaced in one step.

    Raises:
        UserError: if a file cannot be written.
    """
    path = Path(path)
    picture, page = (rendered(figure, form) for form in ("png", "pdf"))
    for suffix, content in ((".png", picture), (".pdf", page), (".txt", f"{caption}\n".encode())):
        atomic_write(path.with_suffix(suffix), lambda file, content=content: file.write(content))  # type: ignore[misc]
    return [path.with_suffix(suffix) for suffix in (".png", ".pdf", ".txt")]


def rendered(figure: Figure, form: str, **options: Any) -> bytes:
    """The figure as `png`, `pdf` or `svg`, in the project's style; equal figures give equal bytes."""
    file = io.BytesIO()
    undated = {"pdf": {"CreationDate": None}}
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a name in a script the font has not
        figure.savefig(file, format=form, metadata=undated.get(form), **options)
    return file.getvalue()
