"""Figures as markup inside the page: SVG whose names cannot collide, or PNG where that would be too large."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from xml.etree import ElementTree

import matplotlib as mpl
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw, going_on
from fpq_analysis.plots import FIGURES, Drawing, loss_caption, loss_figure, training_caption, training_figure
from fpq_analysis.plots.style import look, rendered
from fpq_analysis.report.comparisons import variant
from fpq_analysis.report.headings import title
from fpq_analysis.report.study import Study
from fpq_analysis.runs import number_of

MAX_SVG = 300_000  # bytes
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
TALL = 5.5  # inches: figures are one column wide, which a phone shows whole, unless they would be taller than this
ZOOM = 1.8  # CSS pixels a point on a wide screen: text of 7.5 points nearly as large as that of captions
LEAST = 1.2  # and on a narrow one: rather than draw text smaller still, the card scrolls sideways
# Points: up to this width two figures stand side by side on a wide screen, and a figure beside its caption.
PAIRED, ALONE = 430, 560


@dataclass(frozen=True)
class Picture:
    """One figure in the page.

    Attributes:
        anchor: its id in the page.
        title, heading: what its list is of, and what stands above it.
        caption, alt: beside it, and in its place for those who cannot see it.
        width: in points.
        markup: an `<svg>` or `<img>` that holds `alt`.
        beside: whether another figure stands beside it on a wide screen.
    """

    anchor: str
    title: str
    heading: str
    caption: str
    alt: str
    width: float
    markup: Markup
    beside: bool = False

    @property
    def place(self) -> str:
        """What stands beside it on a wide screen: another figure (`pair`), its caption (`alone`), nothing (`wide`)."""
        return "pair" if self.beside else "alone" if self.width <= ALONE else "wide"

    @property
    def sizes(self) -> str:
        """CSS for the wanted and the smallest width."""
        return f"width:{ZOOM * self.width:.0f}px;min-width:{LEAST * self.width:.0f}px"


def pictures(study: Study) -> tuple[list[Picture], dict[Drawing, str]]:
    """Every figure that can be drawn; and those that cannot, with the reason, empty where there are no records.

    Of several definitions of the Hessian the figures show `study.definition` alone; the tables have the others.
    """
    drawn: list[Picture] = []
    missing: dict[Drawing, str] = {}
    for drawing in FIGURES.values():
        frame = study.records(drawing.probe)
        if (frame["definition"] == study.definition).any():
            frame = frame[frame["definition"] == study.definition]
        if frame.empty:
            missing[drawing] = ""
            continue
        with going_on(lambda fault: study.faults.append(str(fault)), drawing.title):
            try:
                figure = fitting(partial(drawing.draw, frame))
            except NothingToDraw as reason:
                missing[drawing] = str(reason)
                continue
            caption = drawing.caption(frame)
            first = next((earlier.title for earlier in drawn if earlier.caption == caption), None)
            caption = caption if first is None else f"The same as '{first}', drawn otherwise."
            of = title(drawing.probe)
            own = drawing.picture.key.isdigit()  # of a figure by its number, what it is of as well
            heading = f"{drawing.title}: {of[0].lower()}{of[1:]}" if own else drawing.title
            drawn.append(picture(drawing.title, drawing.picture.file, figure, caption, heading))
    return drawn, missing


def training_pictures(study: Study) -> list[Picture]:
    """Test accuracies and training losses, from `train.jsonl`, as far as there are any."""
    drawn = []
    accuracies = _training_rows(study, "test_accuracy").rename(columns={"value": "test_accuracy"})
    if len(accuracies):
        figure = fitting(partial(training_figure, accuracies))
        drawn.append(picture("Learning curves", "training", figure, training_caption(accuracies)))
    losses = _training_rows(study, "loss")
    if len(losses):
        drawn.append(picture("Training loss", "losses", fitting(partial(loss_figure, losses)), loss_caption(losses)))
    return drawn


def _training_rows(study: Study, name: str) -> pd.DataFrame:
    """A row for each run, epoch and column of `train.jsonl` that is called so, or so and `_` and more."""
    return pd.DataFrame(
        [
            (*about, row["epoch"], term, value)
            for run in study.runs
            for about in [(run.name, variant(study, run), run.method, run.model, run.dataset, run.bits)]
            for row in run.rows
            for term in row
            if term == name or term.startswith(f"{name}_")
            if (value := number_of(row, term)) is not None
        ],
        columns=["run", "variant", "method", "model", "dataset", "bits", "epoch", "term", "value"],
    )


def side_by_side(pictures: list[Picture]) -> list[Picture]:
    """The same, with those that follow each other and are narrow enough marked as pairs."""
    found: list[Picture] = []
    for one in pictures:
        before = found[-1] if found else None
        if before and not before.beside and max(one.width, before.width) <= PAIRED:
            found[-1] = replace(before, beside=True)
            found.append(replace(one, beside=True))
        else:
            found.append(one)
    return found


def fitting(draw: Callable[[], Figure]) -> Figure:
    """The figure as wide as one column of a page, or as two where that would be too tall."""
    with look(columns=1):
        figure = draw()
    if figure.get_size_inches()[1] > TALL:
        with look(columns=2):
            figure = draw()
    return figure


def picture(name: str, file: str, figure: Figure, caption: str, heading: str = "") -> Picture:
    """`figure` as markup; `file` is its own in the page."""
    alt = describe(heading or name, figure)
    # Ids that matplotlib makes come from the salt: fixed, so that equal records give equal pages.
    with mpl.rc_context({"svg.hashsalt": file}):
        svg = rendered(figure, "svg")
    markup, width = inline(svg, file, alt)
    if len(svg) > MAX_SVG:
        data = base64.b64encode(rendered(figure, "png", dpi=200)).decode()
        markup = Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, alt)
    return Picture(f"figure-{file}", name, heading or name, caption, alt, width, markup)


def inline(svg: bytes, prefix: str, alt: str) -> tuple[Markup, float]:
    """An SVG file as an element of a page, and its width in points.

    Several of matplotlib's SVGs in one page would share ids (`axes_1`): each gets `prefix`.  Its style sheet, which
    would act on the whole page, and its metadata go.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    ids = {element.get("id") for element in root.iter()} - {None}
    for element in root.iter():
        if element.tag == f"{{{SVG}}}path":
            element.attrib.setdefault("d", "")  # what has nothing to draw must say so
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == f"{{{XLINK}}}href" and value[1:] in ids:
                element.set(name, f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                element.set(name, re.sub(r"url\(#", f"url(#{prefix}-", value))
    width = float(root.get("viewBox", "0 0 400 300").split()[2])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    # Safe as it is: ElementTree wrote it, escaping all text.
    return Markup(ElementTree.tostring(root, encoding="unicode")), width


def describe(title: str, figure: Figure) -> str:
    """What the figure shows, for those who cannot see it: panels, axes, and the lines by name."""
    panels = [text for axes in figure.axes if (text := _panel(axes))]
    more = f" And {len(panels) - 6} more panels." if len(panels) > 6 else ""
    return f"{title}. " + " ".join(panels[:6]) + more


def _panel(axes: Axes) -> str:
    labels = [" ".join(text.split()) for text in (axes.get_title(), axes.get_ylabel(), axes.get_xlabel())]
    heading, y, x = labels
    if not any(labels):
        return ""
    text = (f"Panel {heading}: " if heading else "Panel: ") + " against ".join(filter(None, (y, x)))
    lines = list(dict.fromkeys(_line_names(axes)))
    return text + (f"; {', '.join(lines[:8])}{' ...' if len(lines) > 8 else ''}." if lines else ".")


def _line_names(axes: Axes) -> Iterator[str]:
    for line in axes.lines:
        name = str(line.get_label())
        if not name.startswith("_"):
            yield name
