"""Spectral density by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017; Ghorbani, Krishnan, Xiao 2019).

A Lanczos run of m steps from a random unit vector q turns q's spectral measure into m nodes and weights, exact for
polynomials up to degree 2 m - 1.  The mean over q is the spectral density, of total weight 1, so n times the mean of f
over it estimates Tr f(A).  Weights come from an eigendecomposition in float64, and the basis is fully orthogonalised,
so there are no ghosts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fpq_analysis.linalg.lanczos import Lanczos
from fpq_analysis.linalg.matrix import Matrix
from fpq_analysis.linalg.rows import no_room


@dataclass(frozen=True)
class SpectralMeasure:
    """Nodes and weights of every run.

    Attributes:
        nodes, weights: (n_draws, n_steps) float64; a run's weights add up to 1.
        size: n.
        n_products: products with single vectors.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int
    n_products: int

    def moment(self, power: int) -> tuple[float, float]:
        """Tr A^power and its standard error.

        A run's variance over random directions has the closed form 2 (n Tr A^2p - (Tr A^p)^2) / (n + 2), which the
        moments themselves give.  The spread of a few runs is no substitute: it misses a large eigenvalue that none of
        them sees.
        """
        n, runs = self.size, len(self.nodes)
        value, square = (float((self.weights * self.nodes**p).sum()) / runs for p in (power, 2 * power))
        variance = 2 * n**2 * max(0.0, square - value**2) / (n + 2)
        return n * value, math.sqrt(variance / runs)

    def density(self, grid: np.ndarray, width: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Density on a grid, smoothed by a Gaussian.

        Args:
            grid: (g,) eigenvalues.
            width: standard deviation of the Gaussian, one for all or one for each grid point.

        Returns:
            Mean over the runs and its standard error, (g,) each (NaN of a single run).
        """
        width = np.broadcast_to(width, grid.shape)[:, None]
        runs = np.stack([self._smoothed(run, grid, width) for run in range(len(self.nodes))])
        error = runs.std(0, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else np.full(grid.shape, math.nan)
        return runs.mean(0), error

    def _smoothed(self, run: int, grid: np.ndarray, width: np.ndarray) -> np.ndarray:
        bumps = np.exp(-0.5 * ((grid[:, None] - self.nodes[run]) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        return bumps @ self.weights[run]


def spectral_measure(
    matrix: Matrix, *, generator: torch.Generator, n_draws: int = 5, n_steps: int = 40
) -> SpectralMeasure:
    """`n_draws` Lanczos runs of `n_steps` steps each from independent random vectors.

    Args:
        matrix: (n, n), symmetric.
        generator: of these vectors, on the CPU.

    Raises:
        UserError: if the matrix is not finite or not symmetric.
    """
    nodes, weights, products = [], [], 0
    n_steps = min(n_steps, matrix.size)
    for _ in range(n_draws):
        lanczos = Lanczos(matrix, generator=generator)
        lanczos.extend(n_steps)
        if lanczos.full:  # fewer steps would be another rule
            raise no_room(len(lanczos), matrix.size)
        products += lanczos.n_products
        x, w = lanczos.quadrature()
        # A run that found an invariant subspace early has fewer nodes: pad with nodes of weight zero.
        nodes.append(np.pad(x.numpy(), (0, n_steps - len(x)), mode="edge"))
        weights.append(np.pad(w.numpy(), (0, n_steps - len(w))))
    return SpectralMeasure(np.stack(nodes), np.stack(weights), matrix.size, products)
