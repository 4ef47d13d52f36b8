"""Figures as markup inside the page: SVG whose names cannot collide, or PNG where that would be too large."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib as mpl
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpq_analysis.errors import NothingToDraw, going_on
from fpq_analysis.plots import FIGURES, Drawing, training_caption, training_figure
from fpq_analysis.plots.style import rendered
from fpq_analysis.report.comparisons import variant
from fpq_analysis.report.study import Study
from fpq_analysis.runs import number_of

MAX_SVG = 300_000  # bytes
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
ZOOM = 1.55  # CSS pixels a point on a wide screen: text of 9 points as large as the page's
LEAST = 0.85  # and on a narrow one: rather than draw text smaller still, the card scrolls sideways


@dataclass(frozen=True)
class Picture:
    """One figure in the page.

    Attributes:
        anchor: its id in the page.
        caption, alt: beside it, and in its place for those who cannot see it.
        width: in points.
        markup: an `<svg>` or `<img>` that holds `alt`.
    """

    anchor: str
    title: str
    caption: str
    alt: str
    width: float
    markup: Markup

    @property
    def sizes(self) -> str:
        """CSS for the wanted and the smallest width."""
        return f"width:{ZOOM * self.width:.0f}px;min-width:{LEAST * self.width:.0f}px"


def pictures(study: Study) -> tuple[list[Picture], list[Drawing]]:
    """Every figure that has records, and those that have none.

    Of several definitions of the Hessian the figures show `study.definition` alone; the tables have the others.
    """
    drawn, missing = [], []
    for drawing in FIGURES.values():
        frame = study.records(drawing.probe)
        if (frame["definition"] == study.definition).any():
            frame = frame[frame["definition"] == study.definition]
        if frame.empty:
            missing.append(drawing)
            continue
        with going_on(lambda fault: study.faults.append(str(fault)), drawing.title):
            try:
                figure = drawing.draw(frame)
            except NothingToDraw:
                missing.append(drawing)
                continue
            drawn.append(picture(drawing.title, drawing.picture.file, figure, drawing.caption(frame)))
    return drawn, missing


def training_picture(study: Study) -> Picture | None:
    """Test accuracies, from `train.jsonl`; None if there are none."""
    rows = pd.DataFrame(
        [
            (run.name, variant(study, run), run.method, run.model, run.dataset, run.bits, row["epoch"], accuracy)
            for run in study.runs
            for row in run.rows
            if (accuracy := number_of(row, "test_accuracy")) is not None
        ],
        columns=["run", "variant", "method", "model", "dataset", "bits", "epoch", "test_accuracy"],
    )
    if rows.empty:
        return None
    return picture("Training", "training", training_figure(rows), training_caption(rows))


def picture(title: str, name: str, figure: Figure, caption: str) -> Picture:
    """`figure` as markup; `name` is its own in the page."""
    alt = describe(title, figure)
    # Ids that matplotlib makes come from the salt: fixed, so that equal records give equal pages.
    with mpl.rc_context({"svg.hashsalt": name}):
        svg = rendered(figure, "svg")
    markup, width = inline(svg, name, alt)
    if len(svg) > MAX_SVG:
        data = base64.b64encode(rendered(figure, "png", dpi=200)).decode()
        markup = Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, alt)
    return Picture(f"figure-{name}", title, caption, alt, width, markup)


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
