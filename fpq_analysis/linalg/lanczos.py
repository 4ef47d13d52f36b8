"""The Lanczos process with full reorthogonalisation (Lanczos 1950; Paige 1972 on why the plain one loses its way)."""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_analysis.linalg.matrix import Matrix, inner, norms, random_normal, wide


class Lanczos:
    """An orthonormal basis Q of the Krylov space of a start vector, with Z = A Q, and T = Q^T A Q tridiagonal.

    Grown by `extend`, a product a column.  Every new column is orthogonalised against all before it, twice: without
    that, converged eigenvalues come back as ghosts.

    Attributes:
        q, z: (n, m).
        alpha: (m,), diagonal of T; beta: (m,), beside it, the last one being the norm of what comes next.
        ended: the Krylov space is exhausted; an invariant subspace was found.
        n_products: products so far; COST: products a column.
    """

    COST = 1

    def __init__(
        self, matrix: Matrix, *, generator: torch.Generator | None = None, start: Tensor | None = None
    ) -> None:
        """Either a `start` vector (n,), or a `generator` for one of random direction."""
        if start is None:
            assert generator is not None
            start = random_normal(matrix, 1, generator)[:, 0]
        self.matrix = matrix
        self.q = self.z = start.new_empty(matrix.size, 0)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.next = start / float(norms(start))
        self.ended = False

    def extend(self, steps: int) -> None:
        """Grow the basis by `steps` columns; by fewer where the space ends."""
        steps = min(steps, self.matrix.size - len(self.alpha))
        done = len(self.alpha)
        q = torch.cat([self.q, self.q.new_empty(self.matrix.size, steps)], 1)
        z = torch.cat([self.z, self.z.new_empty(self.matrix.size, steps)], 1)
        for m in range(done, done + steps):
            if self.ended:
                break
            q[:, m] = self.next
            w = self.matrix.matmat(q[:, m : m + 1])
            z[:, m] = w[:, 0]
            self.alpha.append(float(inner(q[:, m : m + 1], w)))
            for _ in range(2):
                w = w - q[:, : m + 1] @ inner(q[:, : m + 1], w).to(w)
            norm = float(norms(w))
            self.beta.append(norm)
            scale = max(map(abs, (*self.alpha, *self.beta)))
            self.ended = not norm > 100 * torch.finfo(w.dtype).eps * scale
            if not self.ended:
                self.next = w[:, 0] / norm
        self.q, self.z = q[:, : len(self.alpha)], z[:, : len(self.alpha)]

    @property
    def n_products(self) -> int:
        return len(self.alpha)

    def tridiagonal(self) -> Tensor:
        """T, (m, m) in float64 on the CPU."""
        beta = torch.tensor(self.beta[:-1], dtype=torch.float64)
        return torch.diag(torch.tensor(self.alpha, dtype=torch.float64)) + beta.diag(1) + beta.diag(-1)

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights (m,) of the Gauss rule for the start vector's spectral measure (Golub, Welsch 1969)."""
        nodes, vectors = torch.linalg.eigh(wide(self.tridiagonal()))
        return nodes, vectors[0].square()
