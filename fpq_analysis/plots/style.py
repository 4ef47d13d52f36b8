"""One style for all figures: sizes, fonts, lines; a method's colour and name are those of `methods.py`."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from fpq_analysis.files import atomic_write
from fpq_analysis.methods import METHODS, method_label

SPARE_COLOURS = ("#8C564B", "#7F7F7F", "#B5A300")  # of methods to which `methods.py` gives none, and unknown ones
LINES = {"FP": "-", "W4A4": "-", "W2A4": "--", "W2A2": ":", "W8A8": "-."}
MARKERS = {"FP": "o", "W4A4": "o", "W2A4": "s", "W2A2": "^", "W8A8": "D"}

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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
        "font.size": 9,
        "axes.titlesize": 10,
        "figure.dpi": 150,
        "grid.color": "#E6E6E6",
        "grid.linestyle": "-",
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 3.5,
        "lines.solid_capstyle": "round",
        "pdf.fonttype": 42,  # text stays text in PDF
        "svg.fonttype": "none",
        "text.parse_math": False,  # names of runs, layers and the like are text, with or without a dollar
        "savefig.bbox": "tight",
    }
    with mpl.rc_context(ours):
        yield


def colour(method: str, methods: list[str]) -> str:
    """The method's own colour; methods without one share the spare ones, in order."""
    own = {name: row.colour for name, row in METHODS.items() if row.colour}
    if method in own:
        return own[method]
    spare = [m for m in methods if m not in own]
    return SPARE_COLOURS[spare.index(method) % len(SPARE_COLOURS)]


def at_epoch(text: str, epoch: Any) -> str:
    """The text with an epoch behind it; a network outside of any run has none, which is the empty text."""
    return ", ".join(filter(None, [text, f"epoch {epoch}" if epoch != "" else ""]))


def run_label(first: pd.Series, rows: pd.DataFrame) -> str:
    """What a legend or title calls the run of a row: method and bits; where another has the same, its seed or name.

    Args:
        rows: of all the runs that it stands among.
    """
    text = method_label(first["method"], first["bits"])
    alike = rows[(rows["method"] == first["method"]) & (rows["bits"] == first["bits"])]
    runs = alike["run"].nunique()
    if runs < 2:
        return text
    return (
        f"{text}, seed {first['train_seed']}" if alike["train_seed"].nunique() == runs else f"{text} ({first['run']})"
    )


def line_style(method: str, bits: str, methods: list[str]) -> dict[str, Any]:
    """How the line of a run is drawn: colour by method, line and marker by bit width."""
    color = colour(method, methods)
    return {"color": color, "linestyle": LINES.get(bits, "-"), "marker": MARKERS.get(bits, "o")}


def epoch_axis(axes: Axes, ticks: int = 10) -> None:
    """Label the x axis as one of epochs, with whole numbers, `ticks` at most."""
    axes.set_xlabel("Epoch (0: before training)")
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, min_n_ticks=1))


def band(axes: Axes, x: Any, value: pd.Series, half: pd.Series, color: str, alpha: float = 0.15) -> None:
    """The interval value ± half along x, none where half is not known; of a single point a bar."""
    half = half.fillna(0)
    if len(value) == 1:
        axes.errorbar(x, value, half, color=color, linewidth=1.0, capsize=3, fmt="none")
    else:
        axes.fill_between(x, value - half, value + half, color=color, alpha=alpha, linewidth=0)


def log_if_wide(axes: Axes, low: float, high: float, numbers: str = "{x:g}") -> bool:
    """Make the y axis logarithmic, with plain numbers, if values span more than a factor of ten; return whether.

    Args:
        low, high: the least and the largest value.
        numbers: format of the tick labels, of `x`.
    """
    wide = low > 0 and high > 10 * low
    if wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter(numbers))
    return wide


def powers_of_ten(axis: Axis) -> None:
    """Label a logarithmic axis 10⁻³, 10⁻², ...: in plain text, as mathtext is off."""
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"10{f'{math.log10(x):.0f}'.translate(SUPERSCRIPTS)}"))
    axis.set_minor_formatter(NullFormatter())


def legend_by_ends(axes: Axes, ends: list[tuple[float, Any]]) -> None:
    """A legend on the right in the order of the lines' right ends, so that it can be read without matching colours.

    Args:
        ends: the last value of each line, and its artist.
    """
    handles = [line for _, line in sorted(ends, key=lambda end: -end[0])]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))


def panels(
    rows: pd.DataFrame, size: tuple[float, float], shared: bool
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A new figure with a titled panel for each run, definition and estimator, at most three in a row.

    Args:
        rows: records, not empty.
        size: of a panel, in inches.
        shared: whether all have one y axis.

    Returns:
        The figure, and of each panel the axes and the rows.
    """
    groups = list(rows.groupby(["run", "definition", "estimator"], sort=True))
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
    found: list[tuple[Axes, pd.DataFrame]] = []
    for index, ((_, definition, _), panel) in enumerate(groups):
        axes = figure.add_subplot(down, across, index + 1, sharey=found[0][0] if shared and found else None)
        title = run_label(panel.iloc[0], rows)
        axes.set_title(title + (f", {definition}" if rows["definition"].nunique() > 1 else ""))
        found.append((axes, panel))
    return figure, found


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
