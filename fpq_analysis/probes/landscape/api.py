"""Landscapes of checkpoints, as a probe, and of any network, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fpq_analysis.curvature.batches import Batch
from fpq_analysis.forward import ForwardFunction
from fpq_analysis.losses import LossFunction
from fpq_analysis.probes.landscape.choices import LandscapeChoices, quantity
from fpq_analysis.probes.landscape.directions import Move
from fpq_analysis.probes.landscape.grid import LossGrid
from fpq_analysis.probes.point import Point, Rows
from fpq_analysis.probes.result import Result
from fpq_analysis.progress import Progress
from fpq_analysis.ranks import same_on_all_ranks


@dataclass(frozen=True)
class LandscapeSettings(LandscapeChoices):
    """The probe: a landscape about a checkpoint, whose grid points are its pieces.

    Attributes: see `landscape`.

    Raises:
        UserError: for choices that are unknown or contradict each other.
    """

    name = "landscape"
    version = 1

    @property
    def needs(self) -> tuple[str, ...]:
        """The networks that the plane goes through, beside the checkpoint itself."""
        return {"pca": ("trajectory",), "checkpoints": ("through",)}.get(self.plane, ())

    def begin(self, point: Point) -> LossGrid:
        """Put the plane in place."""
        return LossGrid(point.model, point.batches, self, auxiliary=point.auxiliary, seed=point.seed, loss=point.loss)

    def __call__(self, point: Point) -> Rows:
        """Rows: see `grid.py`."""
        grid = self.begin(point)
        return [*grid.notes, *(row for piece in self.pieces(len(point.auxiliary)) for row in grid.measure(piece))]


@dataclass(frozen=True, repr=False)
class Landscape(Result):
    """Losses on a grid, with their errors and everything that says how they were drawn.

    Attributes:
        settings: the choices.
        axes: coordinates of the grid along each axis; zero is the network itself.
        loss: mean loss, (points,) on a line, (points, points) on a plane, where `loss[i, j]` is at `axes[0][i]` and
            `axes[1][j]`.
        sem_data: its standard error over the data.
        rise: loss minus that at the centre.
        rise_sem: its standard error over the data, image by image: what tells whether a dip is real.
        aliased: weights are rounded again and a grid step passes over whole stairs: the picture is a sample of a
            staircase, and its smoothness means nothing.
        directions: the moves of the variables, by name, one for each axis.
        found: all of it as records, see `grid.py` for the quantities.
        seed: see `landscape`.
    """

    settings: LandscapeSettings
    axes: tuple[np.ndarray, ...]
    loss: np.ndarray
    sem_data: np.ndarray
    rise: np.ndarray
    rise_sem: np.ndarray
    aliased: bool
    directions: list[Move]
    found: Rows
    seed: int

    probe = "landscape"

    def rows(self) -> Rows:
        """All of it as records, see `grid.py` for the quantities."""
        return self.found

    def headline(self) -> Sequence[tuple[str, str]]:
        """See `Result`: the loss at the centre, and what lies around it."""
        centre = tuple(int(np.abs(axis).argmin()) for axis in self.axes)
        low, high = (np.unravel_index(where(self.loss), self.loss.shape) for where in (np.nanargmin, np.nanargmax))
        at = ", ".join(f"{axis[i]:.2g}" for axis, i in zip(self.axes, low, strict=True))
        return [
            ("loss at the centre", f"{self.loss[centre]:.4g} ± {self.sem_data[centre]:.2g} (se)"),
            ("lowest minus that", f"{self.rise[low]:.4g} ± {self.rise_sem[low]:.2g} (se), at {at}"),
            ("highest", f"{self.loss[high]:.4g}" + (" (aliased)" if self.aliased else "")),
        ]


@same_on_all_ranks
def landscape(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    plane: str = "random",
    weights: str = "dequantized",
    dim: int = 2,
    points: int = 25,
    span: float | None = None,
    auxiliary: Sequence[nn.Module] = (),
    batchnorm: str = "interpolate",
    loss: str | LossFunction = "cross_entropy",
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> Landscape:
    """The mean loss on a grid of points about a network, in eval mode; full precision, no augmentation.

    The model handed over, its buffers, gradients and mode, and the global random state are untouched.  At the origin
    the loss is the network's own, to the last bit.

    Args:
        model: any `nn.Module`.
        batches: a pair (inputs, targets), or any iterable of such pairs (docs/data.md).
        plane: `random` (filter-normalised), `hessian` (top eigenvectors), `pca` (a trajectory that ends with `model`)
            or `checkpoints` (through `model` and one or two others).
        weights: `dequantized`, `requantized`, `straight-through` or `float`: see docs/landscape.md.
        dim: 1 for a line, 2 for a plane.
        points: grid points along each axis.
        span: half the length of an axis, in multiples of the direction (1; hessian: 0.5); not for planes of
            checkpoints.
        auxiliary: the networks before `model` in a trajectory, in their order; or those to draw the plane through.
        batchnorm: for planes of checkpoints, `interpolate` or `re-estimate` its statistics.
        loss: `cross_entropy`, `squared_error`, a `Loss`, or a function (outputs, targets) to the mean over the batch.
        seed: of random directions, and of the start of the eigenvectors.
        device: where to compute; None for where the model is.
        micro_batch: samples to hold at a time; None chooses by the size of an input.
        forward: how the model is called, a function (model, inputs) to its outputs; None: as docs/data.md says.

    Raises:
        UserError: for choices that are unknown or contradict each other, networks that are not alike or lie on one
            line, data the loss does not fit, or a loss that is not finite at the centre.
    """
    settings = LandscapeSettings(plane, weights, dim, points, span, batchnorm)
    grid = LossGrid(
        model,
        batches,
        settings,
        auxiliary=auxiliary,
        seed=seed,
        loss=loss,
        device=device,
        micro_batch=micro_batch,
        forward=forward,
    )
    pieces = settings.pieces(len(auxiliary))
    rows = [*grid.notes]
    with Progress(len(pieces), settings.name) as progress:
        for piece in pieces:
            rows += grid.measure(piece)
            progress.advance()
    by_quantity = {row["quantity"]: row for row in rows if row["layer"] == "all"}

    def on_grid(name: str, column: str) -> np.ndarray:
        values = [by_quantity[quantity(name, cell)][column] for cell in settings.cells()]
        return np.array(values).reshape([len(axis) for axis in grid.axes])

    return Landscape(
        settings,
        tuple(map(np.array, grid.axes)),
        on_grid("loss", "value"),
        on_grid("loss", "sem_data"),
        on_grid("rise", "value"),
        on_grid("rise", "sem_data"),
        grid.aliased,
        grid.directions,
        rows,
        seed,
    )
