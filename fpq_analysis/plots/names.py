"""What figures call networks, data sets, methods and runs, and with which colour, line and marker each is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import pandas as pd

from fpq_analysis.methods import METHODS, Method, method_label

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
SPARE_COLOURS = ("#8C564B", "#7F7F7F", "#B5A300")  # of methods to which `methods.py` gives none, and unknown ones
LINES: dict[str, Any] = {"FP": "-", "W4A4": "-", "W2A4": "--", "W2A2": ":", "W8A8": "-."}
OTHER_LINE = (0, (5, 1, 1, 1, 1, 1))  # of other bit widths
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
    first = family.iloc[0]
    run = LABELS.get().get(str(first["run"]))
    if run is not None:
        return run
    alike = rows[(rows["method"] == first["method"]) & (rows["bits"] == first["bits"])]
    if alike["run"].nunique() == family["run"].nunique():
        return kind(first)
    return f"{kind(first)} ({first['run']})"


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


def colour(method: str, methods: Sequence[str]) -> str:
    """The method's own colour; methods without one share the spare ones, in order."""
    own = {name: row.colour for name, row in METHODS.items() if row.colour}
    if method in own:
        return own[method]
    spare = [m for m in methods if m not in own]
    return SPARE_COLOURS[spare.index(method) % len(SPARE_COLOURS)]


def line_style(method: str, bits: str, methods: Sequence[str]) -> dict[str, Any]:
    """How a line is drawn: colour and marker by method; line, and whether the marker is filled, by bit width."""
    own = colour(method, methods)
    marker = METHODS.get(method, Method("")).marker
    filled = bits in ("FP", "W4A4", "W8A8")
    return {
        "color": own,
        "linestyle": LINES.get(bits, OTHER_LINE),
        "marker": marker,
        "markerfacecolor": own if filled else "white",
    }
