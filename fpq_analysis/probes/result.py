"""What a measurement of one network returns: a few lines in print, a table of records, and a figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from fpq_analysis.probes.point import Rows
from fpq_analysis.records.table import COLUMNS, NUMBERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 8  # numbers in print


class Result:
    """Base of all results: whatever has a probe's name, a seed and rows can be printed, tabulated and drawn."""

    probe: Any  # name of the probe whose records these are
    seed: Any

    def rows(self) -> Rows:
        """What the probe records of it, see `records.COLUMNS`; the total is last."""
        raise NotImplementedError

    def headline(self) -> Sequence[tuple[str, str]]:
        """Quantities and their numbers, for print: here the whole network's."""
        rows = [row for row in self.rows() if row["layer"] == "all"]
        alike = len({row["estimator"] for row in rows}) == 1  # then it stands in the title
        return [(row["quantity"], with_error(row) + ("" if alike else f", {row['estimator']}")) for row in rows]

    def frame(self, run: str = "") -> pd.DataFrame:
        """A row for each layer and quantity, the whole network's (layer `all`) last.

        The columns are those of `records.COLUMNS`, as the figures of `fpq_analysis.plots` take them; what a single
        network does not know is None.

        Args:
            run: what figures call the network.
        """
        common = {"run": run, "key": run, "settings": run, "probe": self.probe, "seed": self.seed, "status": "ok"}
        frame = pd.DataFrame([{**dict.fromkeys(COLUMNS), **common, **row} for row in self.rows()])
        return frame.astype(dict.fromkeys(NUMBERS, float))

    def plot(self) -> Figure:
        """The figure of a single network: the probe's own where it has one, otherwise its numbers layer by layer."""
        from fpq_analysis.plots import single_figure

        return single_figure(self.frame())

    def __repr__(self) -> str:
        rows, lines = self.rows(), list(self.headline())
        last = rows[-1]
        estimators = {row["estimator"] for row in rows if row["layer"] == "all"}
        how = [last.get("definition"), *(estimators if len(estimators) == 1 else ())]
        data = [f"n_data {last['n_data']}", f"seed {self.seed}"] if last["n_data"] else []
        title = f"{type(self).__name__}: " + ", ".join(filter(None, [self.probe, *how, *data]))
        width = max(len(quantity) for quantity, _ in lines)
        shown = [f"  {quantity:<{width}}  {text}" for quantity, text in lines[-MOST:]]
        rest = len(rows) - len(shown)
        more = [f"  {rest} more in .frame()"] if rest else []
        return "\n".join([textwrap.fill(title, 80, subsequent_indent="    "), *shown, *more])


def with_error(row: dict[str, Any]) -> str:
    """A row's number, with half of its 95 % interval, or where that is not known its standard error."""
    for kind, column in (("95 %", "ci95"), ("se", "sem_data"), ("se", "sem")):
        error = row.get(column)
        if error and math.isfinite(error):
            return f"{row['value']:.4g} ± {error:.2g} ({kind})"
    status = row.get("status", "ok")
    return f"{row['value']:.4g}" + ("" if status == "ok" else f" ({status})")


@dataclass(frozen=True, repr=False)
class Measurement(Result):
    """The result of a measurement that is all in its rows.

    Attributes:
        probe: its name.
        found: its rows.
        seed: of everything random in it.
        shown: the quantities to print; none for the last ones.
    """

    probe: str
    found: Rows = field(repr=False)
    seed: int = 0
    shown: tuple[str, ...] = ()

    def rows(self) -> Rows:
        """See `Result`."""
        return self.found

    def __getitem__(self, quantity: str) -> dict[str, Any]:
        """The whole network's row of a quantity: `value`, `sem`, `sem_data`, ...

        Raises:
            KeyError: if there is none.
        """
        by_name = {row["quantity"]: row for row in self.found if row["layer"] == "all"}
        return by_name[quantity]

    def headline(self) -> Sequence[tuple[str, str]]:
        """See `Result`."""
        return [line for line in super().headline() if not self.shown or line[0] in self.shown]
