"""The subspace of Hutch++ (Meyer, Musco, Musco, Woodruff 2021): the range of A S for random signs S."""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_analysis.linalg.matrix import Matrix, random_signs
from fpq_analysis.linalg.rows import Basis, block_sums, combined


class Sketch:
    """An orthonormal basis Q of the range of A S, S random signs, with Z = A Q^T; two products for each row.

    Args:
        matrix: (n, n), symmetric.
        generator: of the signs, on the CPU.

    Attributes:
        q, z: (m, n); z is the products of the rows of q.
        ended: the range is exhausted; full: memory ran out before the last `extend` was done.
        n_products: products so far; COST: products a row.
    """

    COST = 2

    def __init__(self, matrix: Matrix, *, generator: torch.Generator) -> None:
        self.matrix = matrix
        self.generator = generator
        self._basis = Basis(matrix.size, matrix.dtype, matrix.device)
        self.z = self._basis.rows
        self.ended = self.full = False
        self.n_products = 0

    def __len__(self) -> int:
        return len(self._basis)

    @property
    def q(self) -> Tensor:
        """(m, n), a view."""
        return self._basis.rows

    def extend(self, rows: int) -> None:
        """Grow the basis by `rows`; by fewer where the range or the memory ends."""
        before = len(self)
        rows = min(rows, self.matrix.size - before)
        self.full = not self._basis.reserve(before + rows)
        rows = min(rows, self._basis.capacity - before)
        self._basis.extend(self.matrix.products(random_signs(self.matrix, rows, self.generator)))
        new = self.q[before:]
        self.ended = len(new) < rows
        self.z = torch.cat([self.z, self.matrix.products(new)]) if len(new) else self.z
        self.n_products += rows + len(new)

    def moved(self, coefficients: Tensor) -> Tensor:
        """A Q^T C for C (m, k), as rows (k, n)."""
        return combined(coefficients.T, self.z)

    def traces(self, blocks: list[slice]) -> Tensor:
        """Traces of the diagonal blocks of A Q^T Q, (blocks,)."""
        return block_sums(self.q, self.z, blocks).sum(0)
