"""What figures call networks, data sets, methods and runs, and with which colour, line and marker each is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import pandas as pd

from fpq_analysis.methods import METHODS, method_label

TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagefolder": "image folder",
    "resnet20": "ResNet-20",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
}
LABELS: ContextVar[Mapping[str, str]] = ContextVar(
    "labels", default=MappingProxyType({})
)  # the user's own; see `style.look`
# Of methods to which `methods.py` gives none, of unknown ones, and of several runs of one method: colours whose
# lightness differs from each to the next, and shapes that no method has.  Each goes round by itself: 30 looks.
SPARE_COLOURS = ("#34495E", "#B5A300", "#8C564B", "#17A2B8", "#7F7F7F", "#7CB342")
BAR = ((-1, -2), (1, -2), (1, 2), (-1, 2), (-1, -2))
HOURGLASS = ((-1, -1), (1, -1), (-1, 1), (1, 1), (-1, -1))
BOW_TIE = ((-1, -1), (-1, 1), (1, -1), (1, 1), (-1, -1))
SPARE_MARKERS = ("X", BAR, HOURGLASS, BOW_TIE, "*")
LINES: dict[str, Any] = {"FP": "-", "W4A4": "-", "W2A4": "--", "W2A2": ":", "W8A8": "-."}
OTHER_LINE = (0, (5, 1, 1, 1, 1, 1))  # of other bit widths
DASHES = ("-", "--", "-.", ":", OTHER_LINE, (0, (10, 3)), (0, (1, 4)))  # of lines without markers, one after the other
HATCHES = {"FP": "", "W4A4": "", "W2A4": "/////", "W2A2": "xxxxx", "W8A8": "....."}


def title(name: object) -> str:
    """What a reader calls a network or data set."""
    return LABELS.get().get(str(name), TITLES.get(str(name), str(name)))


def subject(first: pd.Series) -> str:
    """Network and data set of a row."""
    return f"{title(first['model'])}, {title(first['dataset'])}"


def titles(rows: pd.DataFrame, column: str) -> str:
    """The different networks or data sets, for captions."""
    return ", ".join(sorted({title(name) for name in rows[column]}))


def kind(first: pd.Series) -> str:
    """Method and bits of a row."""
    bits = str(first["bits"])
    return method_title(str(first["method"])) + (f" {bits}" if bits != "FP" else "")


def method_title(method: str) -> str:
    """What a reader calls a method."""
    return LABELS.get().get(method, method_label(method))


def family_label(family: pd.DataFrame, rows: pd.DataFrame) -> str:
    """What a legend or title calls runs that differ by their seed alone, see `records.seeds`.

    Method and bits; where others among `rows` have the same, the name of the run, or of the first of them.
    """
    return _label(family, rows, kind(family.iloc[0]))


def family_title(family: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The same without bits."""
    return _label(family, rows, method_title(str(family["method"].iloc[0])))


def _label(family: pd.DataFrame, rows: pd.DataFrame, words: str) -> str:
    first = family.iloc[0]
    run = LABELS.get().get(str(first["run"]))
    if run is not None:
        return run
    alike = rows[(rows["method"] == first["method"]) & (rows["bits"] == first["bits"])]
    return words if alike["run"].nunique() == family["run"].nunique() else f"{words} ({first['run']})"


def run_label(first: pd.Series, rows: pd.DataFrame) -> str:
    """What a legend or title calls the run of a row: method and bits; where another has the same, its seed or name.

    Args:
        rows: of all the runs that it stands among.
    """
    alike = rows[(rows["method"] == first["method"]) & (rows["bits"] == first["bits"])]
    runs = alike["run"].nunique()
    if runs < 2 or first["run"] in LABELS.get():
        return LABELS.get().get(str(first["run"]), kind(first))
    seeds = alike["train_seed"].nunique() == runs
    return f"{kind(first)}, seed {first['train_seed']}" if seeds else f"{kind(first)} ({first['run']})"


def at_epoch(text: str, epoch: Any) -> str:
    """The text with an epoch behind it; a network outside of any run has none, which is the empty text."""
    return ", ".join(filter(None, [text, f"epoch {epoch}" if epoch != "" else ""]))


class Looks:
    """The colour, marker and line of every run of a figure.

    A method has a colour and a marker of its own.  Methods without one, and runs that differ by more than their seed
    from another of the same method and bits, have spare ones, in order.
    """

    def __init__(self, families: Iterable[pd.DataFrame]) -> None:
        """`families`: of the whole figure, the rows of runs that are drawn alike; see `records.seeds.families`."""
        self._places: dict[object, tuple[str, int]] = {}
        alike: Counter[tuple[str, ...]] = Counter()
        for family in families:
            key = tuple(str(family[column].iloc[0]) for column in ("method", "bits", "model", "dataset"))
            known = [self._places[run] for run in family["run"] if run in self._places]  # measured on other data, too
            place = known[0] if known else (key[0], alike[key])
            alike[key] += not known
            for run in family["run"]:
                self._places.setdefault(run, place)
        owners = {name for name, row in METHODS.items() if row.colour}
        strangers = [place for place in self._places.values() if place[1] or place[0] not in owners]
        self._spare = list(dict.fromkeys(strangers))

    def _of(self, first: pd.Series | Mapping[str, Any]) -> tuple[str, Any]:
        """Colour and marker of the run of a row."""
        place = self._places[first["run"]]
        if place in self._spare:
            i = self._spare.index(place)
            return SPARE_COLOURS[i % len(SPARE_COLOURS)], SPARE_MARKERS[i % len(SPARE_MARKERS)]
        own = METHODS[place[0]]
        return str(own.colour), own.marker

    def dash(self, first: pd.Series | Mapping[str, Any]) -> Any:
        """How a line without markers is drawn, so that it is not told apart by its colour alone."""
        places = list(dict.fromkeys(self._places.values()))
        return DASHES[places.index(self._places[first["run"]]) % len(DASHES)]

    def colour(self, first: pd.Series | Mapping[str, Any]) -> str:
        """The colour of the run of a row."""
        return self._of(first)[0]

    def line(self, first: pd.Series | Mapping[str, Any]) -> dict[str, Any]:
        """How its line is drawn: the line itself, and whether markers are filled, by bit width."""
        (own, marker), bits = self._of(first), str(first["bits"])
        filled = bits in ("FP", "W4A4", "W8A8")
        return {
            "color": own,
            "linestyle": LINES.get(bits, OTHER_LINE),
            "marker": marker,
            "markerfacecolor": own if filled else "white",
        }
