"""Tables as rows of cells, each with its text and, where it is a number, the number itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fpq_analysis.report.study import Study
from fpq_analysis.runs import Run
from fpq_analysis.text import number

NONE = "–"
SHORT_HASH = 12


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown.
        value: the number behind it, in full; None for words.
        number: whether it stands in a column of numbers.
        colour: of the method, as in the figures.
        code: whether it is a hash.
        interval: a picture in place of text.
    """

    text: str
    value: float | None = None
    number: bool = False
    colour: str = ""
    code: bool = False
    interval: Interval | None = None


@dataclass(frozen=True)
class Interval:
    """A difference and its interval as a small picture, 0 to 100 wide, 0 in the middle."""

    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: what it is, for those who cannot see it.
        heads: column headings; those of numbers are right aligned, see the first row's cells.
        rows: of cells, as many as heads; the first is the row's heading.
        notes: sentences below it.
    """

    name: str
    heads: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def told(self) -> Table:
        """The table as it is shown: of columns whose cells are all equal a note says the value, once."""
        columns = list(zip(*self.rows, strict=True))
        several = range(1, len(columns)) if len(self.rows) > 1 else ()
        alike = [i for i in several if columns[i].count(columns[i][0]) == len(self.rows)]
        if not alike:
            return self
        kept = [i for i in range(len(self.heads)) if i not in alike]
        texts = [(self.heads[i], columns[i][0].text) for i in alike]
        values = "; ".join(f"{head}: {text}" for head, text in texts if text not in ("", NONE))
        unknown = ", ".join(head for head, text in texts if text == NONE)
        said = [f"The same in all rows: {values}." if values else "", f"Of no row known: {unknown}." if unknown else ""]
        return Table(
            self.name,
            [self.heads[i] for i in kept],
            [[row[i] for i in kept] for row in self.rows],
            [*filter(None, said), *self.notes],
        )

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(row[i].number for row in self.rows) for i in range(len(self.heads))]


def shown(value: float, digits: int) -> str:
    """`value` to so many significant digits, with thousands apart and a true minus."""
    text = number(value, digits)
    if "e" not in text and abs(value) >= 1000:
        text = f"{float(text):,.12g}"
    return text.replace("-", "−")


def digits_beside(value: float, half: float) -> int:
    """Digits of a value that reach as far as two of its error's, and at least 3."""
    if not (half > 0 and value):
        return 4
    return min(9, max(3, math.floor(math.log10(abs(value))) - math.floor(math.log10(half)) + 2))


def num(value: float | None, digits: int = 4, text: str | None = None) -> Cell:
    """A number; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return Cell(NONE, number=True)
    return Cell(text if text is not None else shown(value, digits), float(value), number=True)


def percent(share: float | None, places: int = 2) -> Cell:
    """A share from 0 to 1 in per cent."""
    return num(share, text=None if share is None else f"{100 * share:.{places}f}")


def plain(value: Any) -> str:
    """A setting as text."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_cell(study: Study, run: Run) -> Cell:
    """A run's name with the colour it has in the figures."""
    return Cell(run.name, colour=study.looks.colour({"run": run.name}))
