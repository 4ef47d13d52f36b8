"""Panels, their axes and legends, and curves with intervals that stay inside them."""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from fpq_analysis.methods import bits_rank
from fpq_analysis.plots.names import Looks, family_label, subject
from fpq_analysis.plots.style import COLUMNS, WIDTHS
from fpq_analysis.records.seeds import Curve, families

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WIDE = 10.0  # values that span more than this factor get a logarithmic axis
NARROW = 2.4  # inches of a panel that has no room for long names
MARKED = 12  # points of a line that get a marker, about
GLYPH = 0.06  # inches, of a letter in a title or legend, about
ENTRY = 0.16  # inches, of a line of a legend
BESIDE = 24  # letters of the longest name of a legend that has room beside the panels
NAMED = 24  # lines that a legend names at most


def panels(n: int, height: float, across: tuple[int, int] = (1, 3), **options: Any) -> tuple[Figure, list[Axes]]:
    """A new figure as wide as `style.look` says, and its `n` panels with a letter each (one alone has none).

    Args:
        height: of a panel, in inches.
        across: how many panels a row has at most, in one column and in two.
        options: of `add_subplot`; `sharex`, `sharey` (True): as the first panel's.
    """
    shared = [name for name in ("sharex", "sharey") if options.get(name)]
    if "sharey" in shared and n > 3:  # axes that are labelled once take little room
        across = (max(2, across[0]), across[1])
    beside = abreast(n, across)
    down = -(-n // beside)
    figure = Figure(figsize=(WIDTHS[COLUMNS.get()], height * down + 0.35), layout="constrained")
    found: list[Axes] = []
    for place in range(n):
        own = {**options, **dict.fromkeys(shared, found[0] if found else None)}
        found.append(figure.add_subplot(down, beside, place + 1, **own))
    for axes, letter in zip(found if n > 1 else [], letters(), strict=False):
        axes.set_title(letter, loc="left", fontweight="bold")
    return figure, found


def abreast(n: int, across: tuple[int, int] = (1, 3)) -> int:
    """How many of `n` panels stand in a row: of four two, and not three and one; see `panels`."""
    return math.ceil(n / math.ceil(n / across[COLUMNS.get() - 1]))


def kinds(rows: pd.DataFrame, columns: Sequence[str] = ("definition", "estimator")) -> list[tuple[str, pd.DataFrame]]:
    """A title, and the rows, for those runs that differ by their seed alone and are alike in these columns."""
    several = [column for column in columns if rows[column].nunique() > 1]
    found = []
    for family in families(rows):
        for _, part in family.groupby(list(columns), sort=True, dropna=False):
            own = [str(part[column].iloc[0]) for column in several]
            found.append((", ".join([family_label(family, rows), *own]), part))
    return found


def subjects(rows: pd.DataFrame, most: int = 8) -> list[tuple[str, pd.DataFrame, set[str]]]:
    """A title, the rows, and the bit widths to draw of them: a panel for each network and data set.

    Where there are more lines than `most`, a panel for each bit width, too; each with the float runs, and all with the
    same rows, so that they can have one y axis.
    """
    found = []
    for _, part in rows.groupby(["model", "dataset"], sort=True):
        widths = sorted(set(part["bits"]) - {"FP"}, key=bits_rank)
        about = subject(part.iloc[0])
        if len(widths) < 2 or part[["method", "bits"]].drop_duplicates().shape[0] <= most:
            found.append((about, part, {"FP", *widths}))
        else:
            found += [(f"{about}, {width}", part, {"FP", width}) for width in widths]
    return found


def letters() -> Iterable[str]:
    """`a` to `z`, `aa`, ..."""
    for n in range(1, 100):
        yield from (n * letter for letter in string.ascii_lowercase)


def _across(axes: Axes) -> int:
    """Panels side by side in the figure that these axes are of."""
    grid = axes.get_subplotspec()
    return grid.get_gridspec().ncols if grid is not None else 1


def room(axes: Axes) -> float:
    """How wide a panel is, in inches, about: before the figure is laid out."""
    figure: Any = axes.figure
    across = _across(axes)
    beside = 1.3 if COLUMNS.get() == 2 and across > 1 else 0.0  # for a legend
    return float((figure.get_figwidth() - beside) / across - 0.75)


def head(axes: Axes, text: str) -> None:
    """The panel's title, in as many lines as it takes to stay above the panel."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, max(12, int(room(axes) / GLYPH)))]
    axes.set_title("\n".join(lines))
    letter = axes.get_title("left").strip()
    axes.set_title(letter + "\n" * (len(lines) - 1), loc="left", fontweight="bold")  # beside the first line


def outer(places: Sequence[Axes], *, x: bool = True) -> None:
    """Labels of axes that all panels share, at the left and, with `x`, below the lowest of each column only."""
    for i, axes in enumerate(places):
        across = _across(axes)
        if i % across:
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)
        if x and i + across < len(places):
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)


def legend(figure: Figure, artists: Iterable[Any], most: int = 4) -> None:
    """One legend for the whole figure, of each label the first artist: to the right of many short ones, else below.

    The figure becomes as high as the legend needs; of very many lines it names some, and says how many more there are.
    """
    by_label: dict[str, Any] = {}
    for artist in artists:
        by_label.setdefault(str(artist.get_label()), artist)
    if not by_label:
        return
    if len(by_label) > NAMED:
        named = dict(list(by_label.items())[: NAMED - 1])
        more = f"and {len(by_label) - len(named)} more"
        by_label = named | {more: Line2D([], [], linestyle="", label=more)}
    letters = int((figure.get_figwidth() - 0.6) / (0.9 * GLYPH))
    by_label = {textwrap.fill(label, letters): artist for label, artist in by_label.items()}
    longest = max(len(line) for label in by_label for line in label.split("\n"))
    if COLUMNS.get() == 2 and len(by_label) > most and longest <= BESIDE:
        figure.set_figheight(max(figure.get_figheight(), ENTRY * len(by_label) + 0.3))
        figure.legend(by_label.values(), by_label, loc="outside right center", handlelength=2.4)
        return
    columns = max(1, min(len(by_label), int(figure.get_figwidth() / (0.4 + 0.9 * GLYPH * longest))))
    lines = math.ceil(sum(1 + label.count("\n") for label in by_label) / columns)
    figure.set_figheight(figure.get_figheight() + ENTRY * max(0, lines - 2))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=columns, columnspacing=1.2)


def epoch_axis(axes: Axes, ticks: int = 6) -> None:
    """Label the x axis as one of epochs, with whole numbers, `ticks` at most."""
    figure: Any = axes.figure
    narrow = figure.get_figwidth() / _across(axes) < NARROW
    axes.set_xlabel("Epoch" if narrow or axes.dataLim.x0 > 0 else "Epoch (0: before training)")
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, min_n_ticks=1))


def value_axis(axes: Axes, curves: Sequence[Curve], wide: float = WIDE, *, zero: bool = True) -> None:
    """Scale and limits of the y axis: with `zero`, or logarithmic where values span more than the factor `wide`.

    An interval that is much larger than the values, or on a logarithmic axis reaches to zero, goes to the axis' end.
    """
    value, low, high = (np.concatenate([getattr(one, name) for one in curves]) for name in ("value", "low", "high"))
    value = np.concatenate([value, *(run["value"].to_numpy(float) for one in curves for run in one.runs)])
    bottom, top = np.nanmin(value), np.nanmax(value)
    low, high = np.append(low, bottom), np.append(high, top)
    if bottom > 0 and top > wide * bottom:
        axes.set_yscale("log")
        log_ticks(axes.yaxis, top / bottom)
        floor = max(np.nanmin(low[low > 0]), bottom / 4)
        axes.set_ylim(floor / 1.2, min(np.nanmax(high), 8 * top) * 1.2)
    else:
        reach = top - (min(bottom, 0.0) if zero else bottom) or 1.0
        floor, ceiling = max(np.nanmin(low), bottom - reach), min(np.nanmax(high), top + reach)
        floor = min(0.0, floor) if zero else floor
        pad = 0.05 * (ceiling - floor) or 1.0
        axes.set_ylim(0.0 if zero and floor == 0 else floor - pad, ceiling + pad)
        if ceiling >= 1000:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def log_ticks(axis: Axis, span: float) -> None:
    """Plain numbers on a logarithmic axis of values that span this factor: more to a decade the fewer decades."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 300 else (1, 3) if span < 3000 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def powers_of_ten(axis: Axis) -> None:
    """Label a logarithmic axis 10⁻³, 10⁻², ...: in plain text, as mathtext is off."""
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"10{f'{math.log10(x):.0f}'.translate(SUPERSCRIPTS)}"))
    axis.set_minor_formatter(NullFormatter())


def band(axes: Axes, x: Any, low: Any, high: Any, color: str, alpha: float = 0.15, **edge: Any) -> None:
    """The interval from low to high along x, cut off at the ends of the y axis, which are set; of one point a bar."""
    ends = axes.get_ylim()
    low, high = np.clip(low, *ends), np.clip(high, *ends)
    if len(low) == 1:
        middle = (low + high) / 2
        axes.errorbar(x, middle, (high - low) / 2, color=color, linewidth=1.0, capsize=3, fmt="none")
    else:
        axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)
        for end in (low, high) if edge else ():
            axes.plot(x, end, color=color, **edge)


def draw_curve(axes: Axes, one: Curve, look: dict[str, Any], label: str, along: str = "epoch", shift: float = 0) -> Any:
    """The mean of a curve with its interval, and thin lines for each of several runs, on a y axis that is set.

    Args:
        look: how the mean is drawn, as `names.line_style` says.
        shift: to the right, of curves that stand side by side.

    Returns:
        The artist of the mean, for the legend.
    """
    for run in one.runs if len(one.runs) > 1 else ():
        thin = {"linestyle": look.get("linestyle", "-"), "linewidth": 0.6, "alpha": 0.5, "label": "_"}
        point = {"marker": look.get("marker", "o"), "markersize": 2, "linewidth": 0, "alpha": 0.5, "label": "_"}
        axes.plot(run[along] + shift, run["value"], color=look["color"], **(thin if len(run) > 1 else point))
    if one.half.any():
        band(axes, one.x + shift, one.low, one.high, look["color"])
    every = max(1, len(one.x) // MARKED)
    (drawn,) = axes.plot(one.x + shift, one.value, label=label, markevery=every, **look)
    return drawn


def draw_level(axes: Axes, one: Curve, looks: Looks, label: str) -> Any:
    """The last value of a curve as a horizontal line with its interval, on a y axis that is set."""
    one, color = one.last(), looks.colour(one.first)
    low, high = np.clip([one.low[0], one.high[0]], *axes.get_ylim())
    axes.axhspan(low, high, color=color, alpha=0.12, linewidth=0)
    for run in one.runs if len(one.runs) > 1 else ():
        axes.axhline(run["value"].iloc[0], color=color, linewidth=0.6, alpha=0.5, label="_")
    return axes.axhline(one.value[0], color=color, linestyle=looks.dash(one.first), linewidth=1.0, label=label)
