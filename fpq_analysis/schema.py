"""What the files of a run must contain: dataclasses that say so, and one function that checks it.

A file may contain more (settings of a later version, say), but what is used has the stated type and range before
anything is built from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from fpq_analysis.errors import UserError
from fpq_analysis.text import printable

SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True)
class Within:
    """The least and the largest value of a number."""

    low: float
    high: float


Count = Annotated[int, Within(0, 2**53)]
Bits = Annotated[int, Within(1, 32)]
Share = Annotated[float, Within(0, 1)]


@dataclass(frozen=True)
class Network:
    """`model` in a checkpoint."""

    name: str
    num_classes: Annotated[int, Within(1, 1_000_000)]
    in_channels: Annotated[int, Within(1, 4096)]


@dataclass(frozen=True)
class Quantization:
    """`quant` in a checkpoint: the fields of a `QuantSpec`."""

    weight_bits: Bits
    act_bits: Bits
    edge_bits: Bits = 8
    weight_calibration: str = "mse"
    act_calibration: str = "mse"
    scheme: str = "lsq"


@dataclass(frozen=True)
class Data:
    """`data` in a checkpoint and in `run.json`."""

    name: str
    classes: list[str]
    channels: Annotated[int, Within(1, 4096)]
    size: Annotated[int, Within(1, 1_000_000)]
    n_train: Count
    n_test: Count
    fingerprint: str


@dataclass(frozen=True)
class Config:
    """`run` in a checkpoint, `config` in `run.json`: the settings of a training run that are read again."""

    method: str
    model: str
    data: str
    seed: int
    epochs: Annotated[int, Within(1, 10**9)]
    bits: str | None
    init: str | None
    data_root: str | None
    image_size: Annotated[int, Within(1, 1_000_000)] | None
    quantizer: str | None = None


@dataclass(frozen=True)
class CheckpointFile:
    """`epoch_NNNN.pt`, without its format."""

    epoch: Annotated[int, Within(0, 10**9)]
    model: Network
    quant: Quantization | None
    data: Data
    run: Config
    state_dict: dict[str, Any]


@dataclass(frozen=True)
class RunFile:
    """`run.json`."""

    config: Config
    data: Data
    teacher: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""


@dataclass(frozen=True)
class TrainRow:
    """A row of `train.jsonl`."""

    epoch: Annotated[int, Within(0, 10**9)]
    test_accuracy: Share | None = None
    clipped_fraction: Share | None = None
    seconds: Annotated[float, Within(0, math.inf)] | None = None


@dataclass(frozen=True)
class ResumeFile:
    """`resume.pt`."""

    epoch: Annotated[int, Within(0, 10**9)]
    optimizer: dict[str, Any]


@dataclass(frozen=True)
class RecordRow:
    """A row of a file of records, see `records.COLUMNS`."""

    method: str
    model: str
    dataset: str
    bits: str
    epoch: Annotated[int, Within(0, 10**9)]
    layer: str
    quantity: str
    key: str
    settings: str | None = None
    data: str | None = None
    train_seed: int | str | None = None
    checkpoint: str | None = None
    definition: str | None = None
    loss: str | None = None
    estimator: str | None = None
    value: float | None = None
    sem: float | None = None
    sem_data: float | None = None
    ci95: float | None = None
    n_data: Annotated[float, Within(0, 2**53)] | None = None
    n_products: Annotated[float, Within(0, 2**53)] | None = None
    seed: float | None = None
    status: str = "ok"
    seconds: float | None = None
    samples: list[float] | None = None


def check(kind: type, value: Any, what: str, place: str = "") -> None:
    """Raise `UserError` unless `value` has the fields of the dataclass `kind`, each of its type and in its range.

    Args:
        what: the file, as the beginning of a sentence.
        place: the field of it that holds `value`; nothing for the whole.
    """
    if not isinstance(value, dict):
        raise _wrong(what, place or "the whole", value, "named fields")
    for name, (hint, needed) in _hints(kind).items():
        at = f"{place}.{name}" if place else name
        if name in value:
            _value(hint, value[name], what, at)
        elif needed:
            raise UserError(
                f"{what} is damaged, or was not written by this program: it has no field '{at}'. Restore it from a "
                "copy."
            )


def fits(kind: type, value: Any) -> bool:
    """Whether `check` would find nothing."""
    try:
        check(kind, value, "")
    except UserError:
        return False
    return True


@functools.cache
def _hints(kind: type) -> dict[str, tuple[Any, bool]]:
    """For each field its type, and whether it is required."""
    hints = get_type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    return {
        one.name: (hints[one.name], one.default is missing and one.default_factory is missing)
        for one in dataclasses.fields(kind)
    }


@functools.cache
def _taken_apart(hint: Any) -> tuple[tuple[Any, ...], bool, Within | None]:
    """The kinds of a type hint, several of a union; whether None is one; and the limits of a number."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    some = tuple(kind for kind in kinds if kind is not type(None))
    annotated = len(some) == 1 and get_origin(some[0]) is Annotated
    kind, limits = get_args(some[0]) if annotated else (some[0], None)
    return (kind, *some[1:]), len(some) < len(kinds), limits


def _value(hint: Any, value: Any, what: str, place: str) -> None:
    kinds, optional, limits = _taken_apart(hint)
    if value is None and optional:
        return
    kind = kinds[0]
    if len(kinds) > 1:
        if not any(_is(kind, value) for kind in kinds):
            raise _wrong(what, place, value, " or ".join(NAMES[kind] for kind in kinds))
    elif kind in NAMES:
        limits_text = f" from {limits.low:g} to {limits.high:g}" if limits else ""
        if not _is(kind, value) or (limits and not limits.low <= value <= limits.high):
            raise _wrong(what, place, value, NAMES[kind] + limits_text)
    elif dataclasses.is_dataclass(kind):
        check(kind, value, what, place)  # type: ignore[arg-type]
    else:
        container, inner = get_origin(kind), get_args(kind)[-1]
        if not isinstance(value, container):
            raise _wrong(what, place, value, NAMES[container])
        if isinstance(value, dict):
            for key in value:
                if not _is(str, key):
                    raise _wrong(what, f"a name in {place}", key, NAMES[str])
        if inner is float and set(map(type, value)) <= {int, float} and all(map(math.isfinite, value)):
            return  # the samples of a record are thousands
        if inner is not Any:
            for key, one in value.items() if isinstance(value, dict) else enumerate(value):
                if not _is(inner, one):
                    raise _wrong(what, f"{place}[{key!r}]", one, NAMES[inner])


NAMES = {
    int: "a whole number",
    float: "a finite number",
    str: "text without control characters",
    list: "a list",
    dict: "named fields",
}


def _is(kind: Any, value: Any) -> bool:
    if kind is float:
        # An integer too large for a float is no number.
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1.8e308
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str) and printable(value) == value


def _wrong(what: str, place: str, value: Any, wanted: str) -> UserError:
    found = repr(value) if isinstance(value, str | int | float | bool | list | dict | None) else type(value).__name__
    short = found if len(found) <= SHOWN else f"{found[:SHOWN]}..."
    return UserError(
        f"{what} is damaged, or was not written by this program: the field '{place}' is {short}, and must be {wanted}. "
        "Restore it from a copy."
    )
