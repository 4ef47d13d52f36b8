"""`landscape`: the loss of any network on a line or a plane, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import nn

from fpq_analysis.curvature.batches import Batch
from fpq_analysis.losses import Loss
from fpq_analysis.probes.landscape.directions import Move
from fpq_analysis.probes.landscape.recipe import Recipe
from fpq_analysis.probes.landscape.survey import Survey, quantity
from fpq_analysis.probes.point import Rows
from fpq_analysis.progress import Progress
from fpq_analysis.records import COLUMNS


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid, with their errors and everything that says how they were drawn.

    Attributes:
        recipe: the choices.
        axes: coordinates of the grid along each axis; zero is the network itself.
        loss: mean loss, (points,) on a line, (points, points) on a plane, where `loss[i, j]` is at `axes[0][i]` and
            `axes[1][j]`.
        sem_data: its standard error over the data.
        rise: loss minus that at the centre.
        rise_sem: its standard error over the data, image by image: what tells whether a dip is real.
        aliased: weights are rounded again and a grid step passes over whole stairs: the picture is a sample of a
            staircase, and its smoothness means nothing.
        directions: the moves of the variables, by name, one for each axis.
        rows: all of it as records, see `survey.py` for the quantities.
    """

    recipe: Recipe
    axes: tuple[np.ndarray, ...]
    loss: np.ndarray
    sem_data: np.ndarray
    rise: np.ndarray
    rise_sem: np.ndarray
    aliased: bool
    directions: list[Move] = field(repr=False)
    rows: Rows = field(repr=False)

    def frame(self, run: str = "") -> pd.DataFrame:
        """The rows as a table of records, for the figures of `fpq_analysis.plots`; `run` is the title."""
        about = {"run": run, "probe": self.recipe.name, "key": run, "settings": run, "status": "ok"}
        return pd.DataFrame([{**about, **row} for row in self.rows], columns=list(COLUMNS))


def landscape(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    plane: str = "random",
    weights: str = "dequantized",
    dim: int = 2,
    points: int = 25,
    span: float | None = None,
    others: Sequence[nn.Module] = (),
    batchnorm: str = "interpolate",
    loss: str | Loss = "cross_entropy",
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
) -> Landscape:
    """The mean loss on a grid of points about a network, in eval mode; full precision, no augmentation.

    The model handed over, its buffers, gradients and mode, and the global random state are untouched.  At the origin
    the loss is the network's own, to the last bit.

    Args:
        model: any `nn.Module`.
        batches: a pair (inputs, targets) of tensors, or any iterable of such pairs.
        plane: `random` (filter-normalised), `hessian` (top eigenvectors), `pca` (a trajectory that ends with `model`)
            or `checkpoints` (through `model` and one or two others).
        weights: `dequantized`, `requantized`, `straight-through` or `float`: see docs/landscape.md.
        dim: 1 for a line, 2 for a plane.
        points: grid points along each axis.
        span: half the length of an axis, in multiples of the direction (1; hessian: 0.5); not for planes of
            checkpoints.
        others: the networks before `model` in a trajectory, in their order; or those to draw the plane through.
        batchnorm: for planes of checkpoints, `interpolate` or `re-estimate` its statistics.
        loss: `cross_entropy`, or a function (outputs, targets) to the mean over the batch.
        seed: of random directions, and of the start of the eigenvectors.
        device: where to compute; None for where the model is.
        micro_batch: samples to hold at a time; None chooses by the size of an input.

    Raises:
        UserError: for choices that are unknown or contradict each other, networks that are not alike or lie on one
            line, data the loss does not fit, or a loss that is not finite at the centre.
    """
    recipe = Recipe(plane, weights, dim, points, span, batchnorm)
    survey = Survey(model, batches, recipe, others=others, seed=seed, loss=loss, device=device, micro_batch=micro_batch)
    rows = [*survey.notes, *survey.measure_points()]
    with Progress(len(survey.cells), recipe.name) as progress:
        for cell in survey.cells:
            rows += survey.measure_cell(cell)
            progress.advance()
    by_quantity = {row["quantity"]: row for row in rows if row["layer"] == "all"}

    def grid(name: str, column: str) -> np.ndarray:
        values = [by_quantity[quantity(name, cell)][column] for cell in survey.cells]
        return np.array(values).reshape([len(axis) for axis in survey.axes])

    return Landscape(
        recipe,
        tuple(map(np.array, survey.axes)),
        grid("loss", "value"),
        grid("loss", "sem_data"),
        grid("rise", "value"),
        grid("rise", "sem_data"),
        survey.aliased,
        survey.directions,
        rows,
    )
