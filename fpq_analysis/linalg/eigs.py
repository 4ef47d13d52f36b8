"""Extreme eigenpairs of a symmetric matrix: Rayleigh-Ritz in a space that grows by residuals.

The space is the Krylov space of Lanczos (1950): from one vector, the residuals of all Ritz pairs are parallel to its
next one.  The vector is random, or a sum of the eigenvectors of a matrix nearby: a sum, because giving these one by one
costs a product each before anything new is seen, which on networks was more than a cold start took.

The basis V is fully orthogonalised and W = A V is kept, so that the projected matrix V^T W, the Ritz pairs and their
residuals W y - theta V y cost no further product.  When the basis is full it is restarted from the best Ritz vectors
(thick restart: Wu, Simon 2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.linalg.matrix import Matrix, check_symmetric, inner, norms, orthonormalize, random_normal

WHICH = ("LA", "SA", "LM")
# V and W together may take so many bytes.
MAX_BASIS_BYTES = 2**31
# Ritz vectors beyond the wanted ones that are kept for a restart: they hold what comes next.
GUARDS = 2
FRESH = 0.1  # share of the random vector in a warm start
TRIAL = 5  # steps from a fresh random vector where the space has closed


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs, the wanted end first.

    Attributes:
        values: (k,) float64.
        vectors: (n, k), orthonormal.
        residuals: (k,) float64, |A v - value v|: an eigenvalue lies within it around each value.  From the products
            that the basis was made of, and so true to their rounding.
        converged: (k,) bool, whether the residual is within the tolerance, or within rounding.
        n_products: products with single vectors.
        start: (n,), for a warm start at a matrix nearby.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    n_products: int
    start: Tensor


def eigenpairs(
    matrix: Matrix,
    k: int,
    *,
    which: str = "LA",
    tol: float = 1e-3,
    generator: torch.Generator,
    start: Tensor | None = None,
    max_products: int = 1000,
    max_basis: int | None = None,
) -> Eigenpairs:
    """The k largest (`LA`), smallest (`SA`) or largest in magnitude (`LM`) eigenvalues.

    Args:
        matrix: (n, n).
        tol: a pair has converged when its residual is within `tol` times |value|, or within rounding: 50 units in
            the last place of the largest Ritz value.
        generator: of the random vector to start from.
        start: (n,), `start` of a matrix nearby; some of the random vector is mixed in, so that no eigenvector that is
            new is shut out.
        max_products: the most products; pairs may then be left unconverged.
        max_basis: columns of the basis at most; None for what 2 GiB hold.

    Raises:
        UserError: for an unknown end, more pairs than dimensions, or a matrix that is not finite or not symmetric.
    """
    check_which(which)
    n = matrix.size
    if not 1 <= k <= n:
        raise UserError(f"{k} eigenvalues are asked of a matrix with {n} rows.")
    roomiest = MAX_BASIS_BYTES // (2 * n * matrix.dtype.itemsize) if max_basis is None else max_basis
    most = min(n, max(roomiest, k + GUARDS + 2))
    v = w = torch.empty(n, 0, dtype=matrix.dtype, device=matrix.device)
    projected = torch.zeros(0, 0, dtype=torch.float64)
    new = random_normal(matrix, 1, generator)
    if start is not None:
        new = start[:, None].to(new) + FRESH * new / float(norms(new))
    used = trial = 0
    while True:
        new, _ = orthonormalize(new, v)
        if new.shape[1]:
            seen = matrix.matmat(new)
            v, w = torch.cat([v, new], 1), torch.cat([w, seen], 1)
            projected = torch.cat([torch.cat([projected, inner(new, w[:, :-1])]), inner(v, seen)], 1)
            check_symmetric(projected, v.dtype)
            used += 1
        pairs, spare, residuals, closed = _ritz(v, w, projected, k, which, tol, used)
        unconverged = (~pairs.converged).nonzero().flatten().tolist()
        found = len(pairs.values) == k and not unconverged
        if (found and (not closed or trial == TRIAL)) or used >= max_products or v.shape[1] == n:
            return pairs
        # An invariant subspace may lack what its start did not contain, as further copies of an eigenvalue: a fresh
        # random vector is tried for some steps.
        new = w[:, -1:] if found and trial else residuals[:, unconverged[:1]]
        trial = trial + 1 if found else 0
        if v.shape[1] >= most:
            v, w = v @ spare, w @ spare
            projected = inner(v, w)
        if not new.shape[1] or not orthonormalize(new, v)[0].shape[1]:
            new = random_normal(matrix, 1, generator)


def _ritz(
    v: Tensor, w: Tensor, projected: Tensor, k: int, which: str, tol: float, used: int
) -> tuple[Eigenpairs, Tensor, Tensor, bool]:
    """The wanted Ritz pairs; and of those a restart keeps: coordinates, residual vectors, whether all are exact."""
    values, coordinates = torch.linalg.eigh((projected + projected.T) / 2)
    largest = float(values.abs().max())
    kept = _order(values, which)[: k + GUARDS]
    values, coordinates = values[kept], coordinates[:, kept].to(v)
    vectors = v @ coordinates
    residuals = w @ coordinates - vectors * values.to(v)
    sizes = norms(residuals)
    floor = 50 * torch.finfo(v.dtype).eps * largest
    k = min(k, len(values))
    converged = sizes[:k] <= torch.clamp(tol * values[:k].abs(), min=floor)
    # The smaller of the wanted ones converge last, and get more weight.
    start = vectors[:, :k] @ (1 / values[:k].abs().clamp(min=1e-3 * largest or 1.0)).to(v)
    start = start / float(norms(start[:, None]))
    pairs = Eigenpairs(values[:k], vectors[:, :k], sizes[:k], converged, used, start)
    return pairs, coordinates, residuals, bool((sizes <= floor).all())


def _order(values: Tensor, which: str) -> Tensor:
    return {"LA": -values, "SA": values, "LM": -values.abs()}[which].argsort()


def check_which(which: str) -> None:
    """Raise `UserError` unless it is one of `WHICH`."""
    if which not in WHICH:
        raise UserError(
            f"Unknown end '{which}' of the spectrum{did_you_mean(which, WHICH)}. "
            "Known: LA (largest), SA (smallest), LM (largest in magnitude)."
        )
