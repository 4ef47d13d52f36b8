"""XTrace and XNysTrace (Epperly, Tropp, Webber 2024, "XTrace: making the most of every sample").

Every test vector is used twice: for a low-rank approximation, and to estimate the remainder of the approximation built
without it.  So k vectors give k leave-one-out estimates.

The paper takes their standard deviation over sqrt(k) as the error.  But any two estimates t_i share all vectors but
two, and on test matrices that error was too small by factors up to 1.6 (XTrace) and 3 (XNysTrace).  What is missing is
their covariance, which follows from the same products: let d_ij be the change of t_i when test vector j is left out.
As t_i is unbiased for any values of the other vectors, with or without j, three of the four terms of Cov(t_i, t_j)
vanish and E[d_ij d_ji] remains.  With s^2 the sample variance of the t_i,

    sem^2 = s^2 / k + mean over i != j of d_ij d_ji,

which is unbiased for the square of the standard error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fpq_analysis.linalg.estimate import FIRST, MAX_PRODUCTS, Estimate, degrees_of_freedom, mean_and_error, reached
from fpq_analysis.linalg.hutchinson import in_parts
from fpq_analysis.linalg.matrix import Matrix, random_normal, random_signs
from fpq_analysis.linalg.rows import Basis, block_sums, combined, inner, norms

TINY = 1e-300


def xtrace(
    matrix: Matrix,
    blocks: list[slice],
    *,
    generator: torch.Generator,
    n_products: int = 60,
    tol: float | None = None,
    max_products: int = MAX_PRODUCTS,
) -> Estimate:
    """XTrace (Epperly, Tropp, Webber 2024), for a symmetric matrix; two products a test vector.

    The error holds the covariance of the leave-one-out estimates, which the paper leaves out.

    Args:
        matrix: (n, n), symmetric.
        blocks: slices that divide 0 ... size: each one's trace is estimated from the same products.
        n_products: in total, without `tol`.
        tol: relative standard error wanted: starts with 2 `FIRST` products, and doubles them (all are used again).
    """
    most = 2 * min(matrix.size // 2, max_products // 2)
    total = min(n_products if tol is None else 2 * FIRST, most)
    omega = y = z = torch.empty(0, matrix.size, dtype=matrix.dtype, device=matrix.device)
    basis = Basis(matrix.size, matrix.dtype, matrix.device, max(2, total // 2))
    r = torch.zeros(0, 0, dtype=torch.float64)
    while True:
        new = random_normal(matrix, max(2, total // 2) - len(omega), generator)
        # Kept at length sqrt(n), as random signs have it.
        omega = torch.cat([omega, new * (math.sqrt(matrix.size) / norms(new)).to(new)[:, None]])
        seen = in_parts(matrix, omega[len(y) :])
        y = torch.cat([y, seen])
        before = len(basis)
        r_new = basis.extend(seen)
        z = torch.cat([z, in_parts(matrix, basis.rows[before:])]) if len(basis) > before else z
        r = torch.cat([torch.nn.functional.pad(r, (0, 0, 0, len(r_new) - len(r))), r_new], 1)
        estimate = _xtrace(omega, y, basis.rows, z, r, blocks, tol)
        if tol is None or estimate.converged or total >= most:
            return estimate
        total = min(2 * total, most)


def _xtrace(
    omega: Tensor, y: Tensor, q: Tensor, z: Tensor, r: Tensor, blocks: list[slice], tol: float | None
) -> Estimate:
    k, n = omega.shape
    s = _lost_directions(r)
    whole = [slice(0, n)]
    products = block_sums(omega, y, whole)[:, 0]
    small = _Small(n, s, inner(q, omega), inner(q, y), inner(q, z), norms(omega).square(), products)
    without = torch.stack([small.estimates(without=j) for j in range(k)])

    inside = small.inside(without=None)
    v, av = omega - combined(inside.T, q), y - combined(inside.T, z)
    draws = block_sums(v, av, blocks) * small.stretch(norms(v).square(), None)[:, None]
    for index, block in enumerate(blocks):
        known = inner(q[:, block], z[:, block])
        draws[:, index] += known.trace() - (s * (known @ s)).sum(0)
    return _leave_one_out(draws, without, k + len(q), len(q), tol)


def _lost_directions(r: Tensor) -> Tensor:
    """Unit s_i, (rank, k): the basis made without test vector i is Q (I - s_i s_i^T).

    s_i is orthogonal to every column of R (rank, k) but the i-th.  Where that column depends on the others, as all do
    when there are more test vectors than A has dimensions, nothing is lost and s_i is zero.
    """
    _, _, rows = torch.linalg.svd(r, full_matrices=False)
    dependent = 1 - rows.square().sum(0) > 1e-6
    s = torch.linalg.pinv(r, rtol=1e-14).T
    return torch.where(dependent, 0.0, s / s.norm(dim=0).clamp(min=TINY))


@dataclass(frozen=True)
class _Small:
    """XTrace reduced to k x k matrices, so that estimates from subsets of the test vectors cost no products.

    Attributes:
        n: size of the matrix.
        s: (r, k), see above; r is the rank.
        c, d, t: Q Omega^T, Q Y^T, Q Z^T (rows are vectors).
        lengths, products: |omega_i|^2 and omega_i . A omega_i.
    """

    n: int
    s: Tensor
    c: Tensor
    d: Tensor
    t: Tensor
    lengths: Tensor
    products: Tensor

    def removed(self, without: int | None) -> tuple[Tensor, Tensor | None]:
        """Orthonormal directions that leave the basis with each test vector: its own, and that of `without`."""
        if without is None:
            return self.s, None
        also = self.s[:, without : without + 1]
        own = self.s - also * (also * self.s).sum(0)
        return own / own.norm(dim=0).clamp(min=TINY), also

    def inside(self, without: int | None) -> Tensor:
        """Coordinates (r, k) of each test vector in the basis made without it."""
        own, also = self.removed(without)
        c = self.c - own * (own * self.c).sum(0)
        return c if also is None else c - also * (also * c).sum(0)

    def stretch(self, lengths: Tensor, without: int | None) -> Tensor:
        """The direction of M omega is uniform outside the basis, whatever its length: give it the mean length."""
        own, also = self.removed(without)
        outside = self.n - len(self.s) + own.square().sum(0).round()
        if also is not None:
            outside = outside + also.square().sum().round()
        return torch.where(lengths > 1e-20 * self.n, outside / lengths.clamp(min=TINY), 0.0)

    def estimates(self, without: int) -> Tensor:
        """(k,) leave-one-out estimates of the trace from all test vectors but one (its own entry is meaningless)."""
        own, also = self.removed(without)
        assert also is not None
        c = self.inside(without)
        low_rank = self.t.trace() - (own * (self.t @ own)).sum(0) - (also * (self.t @ also)).sum()
        rest = self.products - 2 * (c * self.d).sum(0) + (c * (self.t @ c)).sum(0)
        lengths = (self.lengths - c.square().sum(0)).clamp(min=0)
        return low_rank + rest * self.stretch(lengths, without)


def xnystrace(
    matrix: Matrix,
    blocks: list[slice],
    *,
    generator: torch.Generator,
    n_products: int = 60,
    tol: float | None = None,
    max_products: int = MAX_PRODUCTS,
) -> Estimate:
    """XNysTrace, for a positive semidefinite matrix (Gauss-Newton, Fisher): one product a test vector.

    Leaving out test vector i is a change of rank one, so with Y = A Omega, H = Omega^T Y and h_i = H^-1 e_i each
    estimate is `Tr(Y H^-1 Y^T) + (1 - |Y h_i|^2) / (H^-1)_ii`.  Arguments as for `xtrace`.
    """
    most = min(matrix.size, max_products)
    total = min(n_products if tol is None else FIRST, most)
    omega = y = torch.empty(0, matrix.size, dtype=matrix.dtype, device=matrix.device)
    while True:
        omega = torch.cat([omega, random_signs(matrix, max(2, total) - len(omega), generator)])
        y = torch.cat([y, in_parts(matrix, omega[len(y) :])])
        estimate = _xnystrace(omega, y, blocks, tol)
        if tol is None or estimate.converged or total >= most:
            return estimate
        total = min(2 * total, most)


def _xnystrace(omega: Tensor, y: Tensor, blocks: list[slice], tol: float | None) -> Estimate:
    # A small multiple of the identity keeps H well conditioned, also where A has fewer dimensions than there are test
    # vectors.  The estimate is then that of A + shift I, without bias, and the shift is subtracted at the end.
    k, n = y.shape
    shift = torch.finfo(y.dtype).eps ** 0.5 * float(norms(y).norm()) / math.sqrt(k)
    y = y + shift * omega
    h, w = inner(omega, y), inner(y, y)
    h = (h + h.T) / 2
    without = torch.zeros(k, k, dtype=torch.float64)
    for j in range(k):
        kept = [i for i in range(k) if i != j]
        without[j, kept] = _from_gram(h[kept][:, kept], w[kept][:, kept]) - shift * n

    inverse = torch.linalg.inv(h)
    diagonal = inverse.diagonal()
    solved = combined(inverse, y)
    left = solved / diagonal.to(y)[:, None]  # Y h_i / (H^-1)_ii, (k, n)
    nystrom = block_sums(y, solved, blocks).sum(0)
    draws = nystrom - block_sums(left, left, blocks) * diagonal[:, None] + block_sums(omega, left, blocks)
    sizes = torch.tensor([block.stop - block.start for block in blocks], dtype=torch.float64)
    return _leave_one_out(draws - shift * sizes, without, k, k, tol)


def _from_gram(h: Tensor, w: Tensor) -> Tensor:
    """The leave-one-out estimates from H = Omega^T Y and W = Y^T Y."""
    inverse = torch.linalg.inv(h)
    squares = ((inverse @ w) * inverse.T).sum(1)  # |Y h_i|^2
    return (inverse * w).sum() + (1 - squares) / inverse.diagonal()


def _leave_one_out(draws: Tensor, without: Tensor, n_products: int, rank: int, tol: float | None) -> Estimate:
    """From (k, blocks) estimates; `without[j, i]` is the i-th in sum when test vector j is left out altogether."""
    k = len(draws)
    blocks, block_sems = mean_and_error(draws)
    value, spread = (float(x) for x in mean_and_error(draws.sum(1)))
    change = (draws.sum(1) - without).fill_diagonal_(0)
    covariance = float((change * change.T).sum()) / (k * (k - 1))
    # The estimated covariance may be negative; the error is then that of independent estimates.
    sem = math.sqrt(spread**2 + max(0.0, covariance))
    # The blocks' covariances are not computed, but assumed to be relatively as large as that of the sum.
    block_sems = block_sems * (sem / spread if spread else 1.0)
    whole = draws.sum(1)
    dof = degrees_of_freedom(whole)
    return Estimate(value, sem, blocks, block_sems, dof, whole, n_products, rank, reached(value, sem, tol))
