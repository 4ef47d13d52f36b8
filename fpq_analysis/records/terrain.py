"""A landscape as grids of numbers, read from the rows that its points are in the records."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from fpq_analysis.methods import method_label


@dataclass(frozen=True)
class Terrain:
    """One landscape, read from its records.

    Attributes:
        title: of its panel or line.
        grid: coordinates along each axis.
        loss: mean loss at every point, NaN where not finite; half: half of its 95 % interval.
        rise: loss minus that at the centre; rise_half: half of its 95 % interval, taken image by image.
        names: of the axes.
        networks: those on or near the plane, a row each, in their order: `x`, `y`, `value` (loss), `gap` (minus the
            loss at the projection), `name`, and the columns of records; empty on planes of directions.
        trajectory: whether they are one.
        moves: how far a grid step moves the weights, in quantization steps, the larger of the axes; NaN without any.
        aliased: whether that is too far for what is shown.
        explained: share of the squared distances that lies on the plane (pca), or NaN.
        first: a row, for what all rows have in common.
    """

    title: str
    grid: tuple[np.ndarray, ...]
    loss: np.ndarray
    half: np.ndarray
    rise: np.ndarray
    rise_half: np.ndarray
    names: tuple[str, ...]
    networks: pd.DataFrame
    trajectory: bool
    moves: float
    aliased: bool
    explained: float
    first: dict[str, Any]

    @property
    def heading(self) -> str:
        """The title, with a word if it is aliased."""
        return self.title + (" (aliased)" if self.aliased else "")

    @property
    def centre(self) -> tuple[int, ...]:
        """Place of the network itself."""
        return tuple(int(np.flatnonzero(axis == 0)[0]) for axis in self.grid)


def terrains(records: pd.DataFrame) -> list[Terrain]:
    """The landscapes that are complete; a point whose loss is not finite counts as there."""
    whole = records[records["layer"] == "all"]
    found = [terrain for _, rows in whole.groupby("key", sort=False) if (terrain := _terrain(rows)) is not None]
    return [replace(one, title=one.title + _apart(one, found)) for one in found]


def _apart(one: Terrain, found: list[Terrain]) -> str:
    """What tells a landscape from those of equal title: the training seed, or else the run's name."""
    alike = [other for other in found if other.title == one.title]
    if len(alike) < 2:
        return ""
    seeds = len({other.first["train_seed"] for other in alike}) == len(alike)
    return f", seed {one.first['train_seed']}" if seeds else f" ({one.first['run']})"


def _terrain(rows: pd.DataFrame) -> Terrain | None:
    table: dict[str, dict[str, Any]] = {
        str(row["quantity"]): {str(k): v for k, v in row.items()} for row in rows.to_dict("records")
    }
    axes = [table[name] for name in ("axis_1", "axis_2") if name in table]
    grid = tuple(np.array(axis["samples"]) for axis in axes)
    places = ["_".join(map(str, np.add(place, 1))) for place in np.ndindex(*map(len, grid))]
    if not axes or not all(f"rise_{place}" in table for place in places):
        return None

    def values(kind: str, column: str) -> np.ndarray:
        found = np.array([table[f"{kind}_{place}"][column] for place in places], dtype=float)
        return found.reshape([len(axis) for axis in grid])

    def numbers(kind: str) -> list[float]:
        return [float(table[f"{kind}_{k}"]["value"]) for k in (1, 2) if f"{kind}_{k}" in table]

    first = table[f"loss_{places[0]}"]
    explained = numbers("explained")
    networks = _networks(table, bool(explained))
    return Terrain(
        _title(first) if explained or networks.empty else _through(networks),
        grid,
        values("loss", "value"),
        values("loss", "ci95"),
        values("rise", "value"),
        values("rise", "ci95"),
        _axis_names(len(grid), numbers("eigenvalue"), explained, len(networks)),
        networks,
        bool(explained),
        max(numbers("steps"), default=math.nan),
        any(row["status"] == "aliased" for row in table.values()),
        sum(explained) if explained else math.nan,
        first,
    )


def _networks(table: dict[str, dict[str, Any]], trajectory: bool) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    while (name := f"point_{len(rows) + 1}") in table:
        row = table[name]
        x, y = row["samples"][0], row["samples"][-1]
        gap = table[f"gap_{len(rows) + 1}"]["value"]
        rows.append({**row, "x": x, "y": y, "gap": gap, "kind": _title(row), "name": str(len(rows) + 1)})
        if row["epoch"] is not None and row["epoch"] == row["epoch"]:
            epoch = f"epoch {row['epoch']:.0f}"
            rows[-1]["name"] = epoch if trajectory else f"{rows[-1]['kind']}\n{epoch}"
    return pd.DataFrame(rows)


def _title(row: dict[str, Any]) -> str:
    """Method and bits; the run's name where these are unknown."""
    return method_label(row["method"], row["bits"]) if isinstance(row["method"], str) else str(row["run"])


def _through(networks: pd.DataFrame) -> str:
    """Title of the line or plane through these networks."""
    kinds = list(dict.fromkeys(networks["kind"]))
    return (" to " if len(kinds) == 2 else ", ").join(kinds)


def _axis_names(dim: int, eigenvalues: list[float], explained: list[float], n_networks: int) -> tuple[str, ...]:
    if eigenvalues:
        return tuple(f"Eigenvector {k} (λ = {value:.3g})" for k, value in enumerate(eigenvalues, 1))
    if explained:
        return tuple(f"Component {k} ({100 * share:.0f} %)" for k, share in enumerate(explained, 1))
    if n_networks == 2:
        return ("Checkpoint 1 at 0, checkpoint 2 at 1",)
    return tuple(f"Distance along axis {k}" if n_networks else f"Random direction {k}" for k in range(1, dim + 1))
