"""The Lanczos process with full reorthogonalisation (Lanczos 1950; Paige 1972 on why it is needed).

Only the basis is kept, as the products follow from it: with T = Q A Q^T tridiagonal and r the next vector,

    A Q^T = Q^T T + beta r e_m^T ,

so a Ritz pair (theta, Q^T s) has the residual beta |s_m|, known without forming its vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_analysis.linalg.matrix import Matrix, check_symmetric, give_way, random_normal
from fpq_analysis.linalg.rows import Basis, block_sums, combined, inner, norms

LEFT = 4  # components along a row below so many units in the last place are not removed
AT_ONCE = 8  # rows computed together: they take memory


class Lanczos:
    """An orthonormal basis Q of the Krylov space of a start vector, and the matrix projected into it.

    `extend` adds rows, for one product each.  From a product its components along the rows that symmetry couples it to
    are removed first, then what rounding left along all others, twice where that was much.  Without this, converged
    eigenvalues reappear as ghosts (Paige 1972).

    Args:
        matrix: (n, n), symmetric.
        generator: of a start vector of random direction, where none is given, on the CPU.
        start: (n,), of any length but zero.
        most: rows there will be at most, for which memory is set aside; None: n.

    Attributes:
        ended: the Krylov space is exhausted; an invariant subspace was found.
        full: memory ran out before the last `extend` was done.
        n_products: products so far; COST: products a row.
    """

    COST = 1

    def __init__(
        self,
        matrix: Matrix,
        *,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
        most: int | None = None,
    ) -> None:
        if start is None:
            assert generator is not None
            start = random_normal(matrix, 1, generator)[0]
        self.matrix = matrix
        self.n_products = 0
        self.ended = self.full = False
        self.beta = 0.0  # length of the next vector, before normalisation
        # The last row is the next vector, which has no product yet.
        self._basis = Basis(matrix.size, start.dtype, start.device, most=(most or matrix.size) + 1)
        self._basis.extend(start[None].clone())
        # H[i, j] for i <= j is q_i . A q_j as measured; below the diagonal stands what it must be if A is symmetric.
        self._h = torch.zeros(0, 0, dtype=torch.float64)
        self._due = torch.zeros(0, dtype=torch.float64)  # couplings of the next row to those before it, by symmetry

    def __len__(self) -> int:
        return len(self._h)

    @property
    def q(self) -> Tensor:
        """(m, n), a view."""
        return self._basis.rows[: len(self)]

    @property
    def capacity(self) -> int:
        """Rows that there is memory for."""
        return self._basis.capacity - 1

    def reserve(self, rows: int) -> bool:
        """Make room for so many rows, at the expense of what the matrix keeps; False where it is for fewer."""
        rows = min(rows, self.matrix.size) + 1
        return self._basis.reserve(rows) or (give_way(self.matrix) and self._basis.reserve(rows))

    def extend(self, steps: int) -> None:
        """Grow the basis by `steps` rows; by fewer where the space or the memory ends.

        Raises:
            UserError: if the matrix turns out not to be finite or not symmetric.
        """
        stop = min(len(self) + steps, self.matrix.size)
        if stop >= self._basis.capacity:
            self.reserve(max(stop, min(2 * len(self), self._basis.most - 1)))
        self.full = False
        while len(self) < stop and not self.ended and not self.full:
            self.full = len(self) + 1 >= self._basis.capacity
            if not self.full:
                self._step()

    def _step(self) -> None:
        basis, m = self._basis, len(self)
        w = basis.room()
        self.matrix.products(basis.rows[m:], out=w)
        self.n_products += 1
        column = torch.zeros(m + 1, 1, dtype=torch.float64)
        # Coupled rows are few (two, or those kept at a restart), and removing them takes away most of the product.
        first = int(self._due.nonzero()[0]) if bool(self._due.any()) else m
        near = basis.rows[first:]
        column[first:] = inner(near, w)
        w.addmm_(column[first:].T.to(w), near, alpha=-1)
        before = float(norms(w))
        # Components no larger than the rounding of w stay, which saves half of the work; the next step sees them again.
        column += basis.remove_from(w, above=LEFT * torch.finfo(w.dtype).eps * before)
        after = float(norms(w))
        if after < before / 2:
            column += basis.remove_from(w)
            after = float(norms(w))
        h = torch.zeros(m + 1, m + 1, dtype=torch.float64)
        h[:m, :m] = self._h
        h[m, :m] = self._due
        h[:, m] = column[:, 0]
        check_symmetric(h, w.dtype)
        self._h, self.beta = h, after
        self._due = torch.zeros(m + 1, dtype=torch.float64)
        self._due[m] = after
        scale = max(float(h.abs().max()), after)
        self.ended = not after > 100 * torch.finfo(w.dtype).eps * scale
        if not self.ended:
            w.div_(after)
            basis.accept()

    def restart(self, coefficients: Tensor, values: Tensor) -> None:
        """Keep only Ritz vectors and the next vector (thick restart: Wu and Simon 2000).

        Args:
            coefficients: (m, k), of the Ritz vectors in the basis.
            values: (k,), their Ritz values.
        """
        k = coefficients.shape[1]
        going_on = torch.zeros(k + 1, len(self) + 1, dtype=torch.float64)
        going_on[:k, :-1], going_on[k, -1] = coefficients.T, 1
        self._basis.keep(going_on if len(self._basis) > len(self) else going_on[:k, :-1])
        self._h = values.double().diag()
        self._due = self.beta * coefficients[-1].double()

    def shrink(self, rows: int) -> None:
        """Give back the memory of all but so many rows."""
        self._basis.shrink(max(rows, len(self)) + 1)

    def append_random(self, generator: torch.Generator) -> None:
        """Continue with a random vector orthogonal to the basis, unless that spans the whole space."""
        self._basis.drop(len(self))
        self._basis.extend(random_normal(self.matrix, 1, generator))
        self.beta, self._due = 0.0, torch.zeros_like(self._due)
        self.ended = len(self._basis) == len(self)

    def projected(self) -> Tensor:
        """Q A Q^T, (m, m) in float64 on the CPU, symmetric."""
        return (self._h + self._h.T) / 2

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m,) in ascending order, coefficients (m, m) of their vectors as columns, residual norms (m,)."""
        values, coefficients = torch.linalg.eigh(self.projected())
        return values, coefficients, self.beta * coefficients[-1].abs()

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights (m,) of the Gauss rule for the start vector's spectral measure (Golub, Welsch 1969)."""
        values, coefficients, _ = self.ritz()
        return values, coefficients[0].square()

    def moved(self, coefficients: Tensor) -> Tensor:
        """A Q^T C for C (m, k), as rows (k, n), without a product."""
        rows = self._basis.rows
        image = torch.zeros(len(rows), coefficients.shape[1], dtype=torch.float64)
        image[: len(self)] = self.projected() @ coefficients
        if len(rows) > len(self):
            image[-1] = self.beta * coefficients[-1]
        return combined(image.T, rows)

    def traces(self, blocks: list[slice]) -> Tensor:
        """Traces of the diagonal blocks of A Q^T Q, (blocks,)."""
        total = torch.zeros(len(blocks), dtype=torch.float64)
        every = torch.eye(len(self), dtype=torch.float64)
        for some, rows in zip(every.split(AT_ONCE, 1), self.q.split(AT_ONCE), strict=True):
            total += block_sums(rows, self.moved(some), blocks).sum(0)
        return total
