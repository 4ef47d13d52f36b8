"""How a loss landscape is drawn: every choice, by name.

These choices, the seed and the data decide a landscape and the key of its records; `sentence` is printed under every
figure.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from fpq_analysis.errors import UserError, did_you_mean

PLANES = {
    "random": "random directions with the norm of every filter (Li et al. 2018)",
    "hessian": "top eigenvectors of the Hessian",
    "pca": "principal components of a run's checkpoints, about the last",
    "checkpoints": "the line or plane through two or three checkpoints",
}
# What is moved, and the network whose loss is then taken.
WEIGHTS = {
    "dequantized": "the weights Q(w) the network uses, as plain numbers",
    "requantized": "the trained w, rounded again at every point",
    "straight-through": "the trained w, with the centre's rounding residue Q(w) - w and clipping kept fixed",
    "float": "the trained w, quantizers off",
}
# Whose Hessian has its eigenvectors where these weights are moved.
DEFINITION = {
    "dequantized": "dequantized",
    "requantized": "latent",
    "straight-through": "latent",
    "float": "float",
}
BATCHNORM = ("interpolate", "re-estimate")
MOVED_WITH_STATE = ("pca", "checkpoints")  # planes on which BatchNorm statistics and scales move too
# Half the length of an axis: Li et al.'s 1; for eigenvectors, of length 1, the 0.5 of PyHessian's examples.
SPANS = {"random": 1.0, "hessian": 0.5}

Cell = tuple[int, ...]


@dataclass(frozen=True)
class LandscapeChoices:
    """What decides a landscape, beside the network, the data and the seed.

    Attributes:
        plane: a key of `PLANES`.
        weights: a key of `WEIGHTS`.
        dim: 1 for a line, 2 for a plane.
        points: grid points along each axis.
        span: the axes run from -span to span, in multiples of the direction; None for that of `SPANS`.  Planes of
            checkpoints have none: their grid covers the checkpoints.
        batchnorm: on planes of checkpoints, statistics move linearly with the weights (`interpolate`), or are taken
            anew from the data at every point (`re-estimate`).  On other planes they stay as they are.

    Raises:
        UserError: for choices that are unknown or contradict each other.
    """

    plane: str = "random"
    weights: str = "dequantized"
    dim: int = 2
    points: int = 25
    span: float | None = None
    batchnorm: str = "interpolate"

    def __post_init__(self) -> None:
        for what, known in (("plane", PLANES), ("weights", WEIGHTS), ("batchnorm", BATCHNORM)):
            word = getattr(self, what)
            if word not in known:
                raise UserError(f"Unknown {what} '{word}'{did_you_mean(word, known)}. Known: {', '.join(known)}.")
        if self.dim not in (1, 2):
            raise UserError(f"dim is {self.dim}; a landscape is a line (1) or a plane (2).")
        if self.points < 3:
            raise UserError(f"points is {self.points}; an axis needs at least 3.")
        if self.follows_checkpoints:
            self._check_checkpoints()
            return
        if self.points % 2 == 0:
            raise UserError(
                f"points is {self.points}; take an odd number, so that the network itself is a point of the grid."
            )
        if self.batchnorm != "interpolate":
            raise UserError(
                "BatchNorm statistics stay as they are on planes of directions, so that the surface is that of one "
                "function; they are re-estimated on planes of checkpoints only (pca, checkpoints)."
            )
        if self.span is not None and not 0 < self.span < math.inf:
            raise UserError(f"span is {self.span}, and must be a number above zero.")

    def _check_checkpoints(self) -> None:
        if self.span is not None:
            raise UserError("The grid of a plane of checkpoints covers these; leave span out.")
        if self.weights == "straight-through":
            raise UserError(
                "Straight-through weights keep the rounding residue of the centre, so the other checkpoints would not "
                "lie on their own plane. Use dequantized, requantized or float."
            )

    @property
    def follows_checkpoints(self) -> bool:
        """Whether the plane is one of checkpoints, and not of directions from one network."""
        return self.plane in MOVED_WITH_STATE

    def pieces(self, n_auxiliary: int) -> list[str]:
        """Names of what is measured one by one: the networks on or near the plane, and the grid points.

        Args:
            n_auxiliary: networks beside the centre.
        """
        networks = range(1, n_auxiliary + 2) if self.follows_checkpoints else ()
        return [*(f"off_plane_{place}" for place in networks), *(quantity("rise", cell) for cell in self.cells())]

    def cells(self) -> list[Cell]:
        """All grid points, by their places along the axes."""
        return list(itertools.product(range(self.points), repeat=self.dim))

    @property
    def reach(self) -> float:
        """The span, or its default."""
        return self.span or SPANS[self.plane]

    def sentence(self, n_auxiliary: int = 0) -> str:
        """Plane, normalisation and what becomes of BatchNorm and scales, in plain words."""
        if self.plane == "random":
            how = "random directions, filter-normalised" if self.dim == 2 else "random direction, filter-normalised"
            how += ", biases and BatchNorm parameters not moved"
        elif self.plane == "hessian":
            which = "two top eigenvectors" if self.dim == 2 else "top eigenvector"
            how = f"{which} of the Hessian ({DEFINITION[self.weights]}), of length 1"
        elif self.plane == "pca":
            how = f"uncentred PCA of {n_auxiliary + 1} checkpoints about the last, axes in units of distance"
        elif self.dim == 1:
            how = "line from checkpoint 1 (at 0) to checkpoint 2 (at 1)"
        else:
            how = "plane through three checkpoints, orthogonal axes in units of distance"
        if not self.follows_checkpoints:
            return f"{how}; BatchNorm statistics and scales fixed"
        if self.batchnorm == "interpolate":
            return f"{how}; BatchNorm statistics and scales moved linearly with the weights"
        return f"{how}; scales moved linearly with the weights, BatchNorm statistics re-estimated at every point"


def quantity(name: str, cell: Cell) -> str:
    """`loss_1_2` for the first place along axis 1 and the second along axis 2."""
    return "_".join([name, *(str(i + 1) for i in cell)])
