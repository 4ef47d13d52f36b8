"""The subspace of Hutch++ (Meyer, Musco, Musco, Woodruff 2021): the range of A S for random signs S."""

from __future__ import annotations

import torch

from fpq_analysis.linalg.matrix import Matrix, orthonormalize, random_signs


class Sketch:
    """An orthonormal basis Q of the range of A S, with Z = A Q; two products a column.

    Attributes:
        q, z: (n, m).
        ended: the range is exhausted.
        n_products: products so far; COST: products a column.
    """

    COST = 2

    def __init__(self, matrix: Matrix, *, generator: torch.Generator) -> None:
        self.matrix = matrix
        self.generator = generator
        self.q = self.z = torch.empty(matrix.size, 0, dtype=matrix.dtype, device=matrix.device)
        self.ended = False
        self.n_products = 0

    def extend(self, columns: int) -> None:
        """Grow the basis by `columns`; by fewer where the range ends."""
        columns = min(columns, self.matrix.size - self.q.shape[1])
        seen = self.matrix.matmat(random_signs(self.matrix, columns, self.generator))
        new, _ = orthonormalize(seen, self.q)
        self.ended = new.shape[1] < columns
        self.q = torch.cat([self.q, new], 1)
        self.z = torch.cat([self.z, self.matrix.matmat(new)], 1)
        self.n_products += columns + new.shape[1]
