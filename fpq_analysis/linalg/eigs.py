"""Extreme eigenpairs of a symmetric matrix, by the Lanczos process with thick restarts.

The start is random, or the sum of the eigenvectors of a similar matrix.  A sum, because a block of them costs one
product each before anything new is learnt, which on networks was more than a cold start took.  Residuals are known
without Ritz vectors, so none is formed before the last pair has converged.  A full basis is restarted from the best of
them (Wu and Simon 2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpq_analysis.errors import NoMemoryError, UserError, did_you_mean, out_of_memory
from fpq_analysis.linalg.lanczos import Lanczos
from fpq_analysis.linalg.matrix import Matrix, random_normal
from fpq_analysis.linalg.rows import combined, no_room, norms

WHICH = ("LA", "SA", "LM")
# The most bytes that the basis may take.
MAX_BASIS_BYTES = 2**31
# Ritz vectors beyond the wanted ones that are kept for a restart: they hold what comes next.
GUARDS = 2
FRESH = 0.1  # share of the random vector in a warm start
# Where all residuals, the guards' included, are below this share of the largest value, the Krylov space is invariant:
# rounding is amplified by as much as the vectors before it were short.
CLOSED = 1e-9
TRIAL = 5  # steps from a fresh random vector once the space is invariant


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs, the wanted end first.

    Attributes:
        values: (k,) float64.
        vectors: (k, n), orthonormal.
        residuals: (k,) float64, `|A v - value v|`: an eigenvalue lies within this distance of each value.  Computed
            from the products that built the basis: exact to their rounding, or, where a fresh vector was tried, to
            `CLOSED` of the largest value.
        converged: (k,) bool, whether the residual is within the tolerance, or within rounding; False behind a zero, of
            which there may be more copies than one, unless that was found out.
        n_products: products with single vectors.
        start: (n,), for a warm start at a similar matrix.
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
    n_products: int = 1000,
    max_basis: int | None = None,
) -> Eigenpairs:
    """The k largest (`LA`), smallest (`SA`) or largest in magnitude (`LM`) eigenvalues.

    Args:
        matrix: (n, n).
        tol: a pair has converged when its residual is within `tol` times `|value|`, or within rounding: 50 units in
            the last place of the largest Ritz value.
        generator: of the random vector to start from.
        start: (n,), `start` of a similar matrix; some of the random vector is mixed in, so that no new eigenvector is
            excluded.
        n_products: the most products to make; pairs may then be left unconverged.
        max_basis: rows of the basis at most; None for what 2 GiB hold.

    Raises:
        UserError: for an unknown end, more pairs than dimensions, or a matrix that is not finite or not symmetric.
    """
    check_which(which)
    n = matrix.size
    if not 1 <= k <= n:
        raise UserError(f"{k} eigenvalues were asked of a matrix with {n} rows.")
    roomiest = MAX_BASIS_BYTES // (n * matrix.dtype.itemsize) if max_basis is None else max_basis
    fewest = min(n, k + GUARDS + 2)
    most = min(n, max(roomiest, fewest))
    first = random_normal(matrix, 1, generator)[0]
    if start is not None:
        first = start.to(first) + FRESH * first / float(norms(first[None]))
    lanczos = Lanczos(matrix, start=first, most=most)
    trial = 0
    values, coefficients = torch.zeros(0), torch.zeros(0, 0)
    while True:
        try:
            lanczos.extend(1)
        except NoMemoryError:  # for the product: the basis gives way
            most = max(fewest, lanczos.capacity // 2)
            if most >= lanczos.capacity:
                raise
            if len(lanczos) >= most:
                lanczos.restart(coefficients, values)
            lanczos.shrink(most)
            continue
        if lanczos.full:  # from now on it is restarted here
            most = len(lanczos)
            if most < fewest:
                raise no_room(most, n)
        values, coefficients, residuals = lanczos.ritz()
        floor = 50 * torch.finfo(matrix.dtype).eps * float(values.abs().max())
        kept = _order(values, which)[: k + GUARDS]
        values, coefficients, residuals = values[kept], coefficients[:, kept], residuals[kept]
        converged = residuals[:k] <= torch.clamp(tol * values[:k].abs(), min=floor)
        found = len(converged) == k and bool(converged.all())
        closed = lanczos.ended or bool((residuals <= max(floor, CLOSED * float(values.abs().max()))).all())
        if (found and (not closed or trial == TRIAL)) or lanczos.n_products >= n_products or len(lanczos) == n:
            break
        # An invariant subspace lacks what its start did not contain, such as further copies of an eigenvalue: a fresh
        # random vector is tried for some steps, unless a basis of everything is as near.  Ritz vectors that have not
        # converged are not part of that subspace, and must go: the vector that is replaced is coupled to them.
        fresh = lanczos.ended or (found and trial == 0 and lanczos.n_products + TRIAL < n)
        if len(lanczos) >= most or (fresh and not lanczos.ended):
            lanczos.restart(coefficients, values)
        if fresh:
            lanczos.append_random(generator)
        trial = trial + 1 if found and (fresh or trial) else 0
    if not closed and len(lanczos) < n:
        # Of an eigenvalue that occurs many times one copy is seen, and zero often does: whatever stands behind one.
        zero = values[:k].abs() <= floor
        converged = converged & (zero | (zero.cumsum(0) == 0))
    try:
        vectors = combined(coefficients[:, :k].T, lanczos.q)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        lanczos.restart(coefficients[:, :k], values[:k])  # in the memory of the basis, which is not needed any more
        vectors = lanczos.q[:k]
    # The smaller of the wanted ones converge last, and get more weight.
    largest = float(values.abs().max())
    weights = 1 / values[:k].abs().clamp(min=1e-3 * largest or 1.0)
    start = combined(weights[None], vectors)[0]
    start /= float(norms(start[None]))
    return Eigenpairs(values[:k], vectors, residuals[:k], converged, lanczos.n_products, start)


def _order(values: Tensor, which: str) -> Tensor:
    return {"LA": -values, "SA": values, "LM": -values.abs()}[which].argsort()


def check_which(which: str) -> None:
    """Raise `UserError` unless it is one of `WHICH`."""
    if which not in WHICH:
        raise UserError(
            f"Unknown end '{which}' of the spectrum{did_you_mean(which, WHICH)}. "
            "Known: LA (largest), SA (smallest), LM (largest in magnitude)."
        )
