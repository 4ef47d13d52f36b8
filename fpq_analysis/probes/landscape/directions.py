"""Directions in weight space, and grids along them.  A direction is a move of each variable, by its name.

Every plane passes through the network it is drawn about, at (0, 0).  Filter normalisation: Li et al. 2018
(arXiv:1712.09913), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fpq_analysis.errors import UserError

Move = dict[str, Tensor]

# Beyond the checkpoints on their own planes, as a share of their extent.
MARGIN = 0.25
# A second component smaller than this part of the first is rounding error.
SMALLEST = 1e-5
NOISE_SEED = 0x5EED


def random_directions(weights: Mapping[str, Tensor], n: int, seed: int) -> list[Move]:
    """`n` filter-normalised random directions; networks of one architecture get the same draws before that."""
    generator = torch.Generator().manual_seed(seed)
    return [
        # By name, as the order of parameters changes when a network is quantized.
        {
            name: filter_normalised(torch.randn(w.shape, generator=generator, dtype=torch.float32), w)
            for name, w in sorted(weights.items())
        }
        for _ in range(n)
    ]


def filter_normalised(direction: Tensor, weight: Tensor) -> Tensor:
    """The direction with the norm of every filter: output channel of a convolution, row of a linear layer.

    The scale of a filter in front of BatchNorm does not change the function; a direction normalised in this way scales
    with it.  One-dimensional tensors (biases, BatchNorm's parameters) have no filters and get the zero direction.

    Args:
        direction, weight: of one shape, filters along the first axis.
    """
    if weight.ndim <= 1:
        return torch.zeros_like(weight)
    d, w = (t.detach().cpu().double().flatten(1) for t in (direction, weight))
    scaled = d * (w.norm(dim=1) / d.norm(dim=1).clamp(min=torch.finfo(d.dtype).tiny)).unsqueeze(1)
    result = torch.empty_like(weight)  # of the weight's memory layout too
    return result.copy_(scaled.view(weight.shape))


def signed(direction: Move) -> Move:
    """The direction or its opposite, such that its largest entry is positive: eigenvectors come with either sign."""
    largest = max((t.flatten()[t.abs().argmax()] for t in direction.values()), key=lambda x: abs(float(x)))
    return direction if largest > 0 else {name: -t for name, t in direction.items()}


def gram(differences: Sequence[Move]) -> np.ndarray:
    """(m, m) inner products, in float64."""
    found = np.zeros((len(differences), len(differences)))
    for name in differences[0]:
        rows = torch.stack([d[name].detach().cpu().flatten() for d in differences]).double()
        found += (rows @ rows.T).numpy()
    return found


def principal(products: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Principal components of m differences from the centre, from their inner products.

    About the centre itself and not about the mean of the points: otherwise the components would belong to a plane that
    does not hold the centre, and the trajectory would not lie on what is drawn.

    Returns:
        (m, dim) coefficients of the unit-length components in the differences, (m, dim) coordinates of the points, and
        (dim,) the parts of the sum of squared distances from the centre that the components explain.

    Raises:
        UserError: if the points span fewer dimensions.
    """
    values, vectors = np.linalg.eigh(products)
    values, vectors = values[::-1], vectors[:, ::-1]
    if len(values) < dim or values[dim - 1] <= SMALLEST**2 * values[0]:
        raise UserError(
            f"The checkpoints do not span {dim} dimensions: {len(products) + 1} of them, or all of them on a line, or "
            "equal. A plane needs three that differ; for a line use dim=1 (--dim 1)."
        )
    sigma = np.sqrt(values[:dim])
    vectors = vectors[:, :dim] * np.where(vectors[0, :dim] < 0, -1.0, 1.0)  # the first point on the positive side
    return vectors / sigma, vectors * sigma, values[:dim] / values.sum()


def through(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Axes of the line or plane through the centre and one or two other points, from the inner products.

    One point: the axis is its difference, so that it lies at 1.  Two points: Gram-Schmidt, unit length, as in Garipov
    et al. 2018 (arXiv:1802.10026).

    Returns:
        (m, m) coefficients of the axes in the differences, and (m, m) coordinates of the points.

    Raises:
        UserError: if points are equal or on one line.
    """
    lengths = np.sqrt(np.diag(products))
    if lengths.min() == 0:
        raise UserError("Two of the checkpoints are equal, so there is no line through them.")
    if len(products) == 1:
        return np.ones((1, 1)), np.ones((1, 1))
    first = np.array([1 / lengths[0], 0.0])
    along = products[0, 1] / lengths[0]
    rest = np.array([-along / lengths[0], 1.0])
    height = math.sqrt(max(0.0, products[1, 1] - along**2))
    if height <= SMALLEST * lengths[1]:
        raise UserError("The three checkpoints lie on one line, so there is no one plane through them.")
    return np.stack([first, rest / height], 1), np.array([[lengths[0], 0.0], [along, height]])


def combination(differences: Sequence[Move], coefficients: np.ndarray) -> Move:
    """Sum of the differences, each times its coefficient."""
    result: Move = {}
    for name, first in differences[0].items():
        total = torch.zeros_like(first)  # of the layout of the weights
        for difference, factor in zip(differences, coefficients, strict=True):
            total.add_(difference[name], alpha=float(factor))
        result[name] = total
    return result


def inner(a: Move, b: Move) -> float:
    """Inner product over all variables, in float64."""
    return sum(float((x.cpu().double() * b[name].cpu().double()).sum()) for name, x in a.items())


def noise(like: Move) -> Move:
    """Standard normal numbers in the shape of a direction, always the same."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    return {name: torch.randn(t.shape, generator=generator, dtype=torch.float32) for name, t in sorted(like.items())}


def symmetric_grid(points: int, span: float) -> list[float]:
    """`points` (odd) from -span to span; the middle one is exactly zero."""
    half = points // 2
    return [span * k / half for k in range(-half, half + 1)]


def unit_grid(points: int) -> list[float]:
    """`points` on a line through 0 and 1, both of them exactly on the grid, a margin on either side."""
    steps = max(1, round((points - 1) / (1 + 2 * MARGIN)))
    before = (points - 1 - steps) // 2
    return [k / steps for k in range(-before, points - before)]


def covering_grid(coordinates: Sequence[float], points: int) -> list[float]:
    """`points` that cover zero and the coordinates with a margin; zero is exactly on the grid."""
    low, high = min(0.0, *coordinates), max(0.0, *coordinates)
    margin = MARGIN * (high - low)
    step = (high - low + 2 * margin) / (points - 2)  # one to spare, for zero to fall on the grid
    before = math.ceil((margin - low) / step)
    return [step * k for k in range(-before, points - before)]
