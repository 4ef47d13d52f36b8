"""Hutchinson's trace estimator (Hutchinson 1990), plain or with a subspace deflated exactly.

A probe v of random signs gives v . A v, whose mean is the trace.  Its variance is twice the squared norm of the
off-diagonal part of A, which a few large eigenvalues dominate.  With an orthonormal basis Q (rows) of a subspace that
holds most of these, P = Q^T Q and M = I - P,

    Tr A = Tr(A P) + Tr(M A M),       v . M A M v = (M v) . A (M v),

the first part is known from A Q^T, and only the second is probed.  The estimate is unbiased for any Q that does not
depend on the probes.  Hutch++ (Meyer et al. 2021) takes Q from a sketch, two products a row; here it may also be the
basis of a Lanczos process, which takes one product a row and is closer to the extreme eigenvectors.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from fpq_analysis.linalg.estimate import FIRST, MAX_PRODUCTS, Estimate, more_draws
from fpq_analysis.linalg.matrix import Matrix, random_signs
from fpq_analysis.linalg.rows import block_sums, inner

AT_ONCE = 8  # probes in one call: they share the gradient's graph, and take memory
FIRST_RANK = 16
# The most bytes that the basis, and the products where they are kept, may take.
MAX_BASIS_BYTES = 2**31


class Subspace(Protocol):
    """An orthonormal basis `q` (m, n) with A Q^T known.

    A new row costs `COST` products; there is none if it has `ended`, and no memory for one if it is `full`.
    """

    COST: int
    ended: bool
    full: bool

    def __len__(self) -> int: ...
    @property
    def q(self) -> Tensor: ...
    @property
    def n_products(self) -> int: ...

    def extend(self, rows: int) -> None: ...
    def moved(self, coefficients: Tensor) -> Tensor: ...
    def traces(self, blocks: list[slice]) -> Tensor: ...


def hutchinson(
    matrix: Matrix,
    blocks: list[slice],
    *,
    generator: torch.Generator,
    n_products: int = 100,
    tol: float | None = None,
    max_products: int = MAX_PRODUCTS,
) -> Estimate:
    """Random signs v, whose v . A v have the trace as mean (Hutchinson 1990).

    Args:
        matrix: (n, n), symmetric.
        blocks: slices that divide 0 ... size: each one's trace is estimated from the same products.
        n_products: budget without `tol`: one a probe.
        tol: relative standard error wanted: `FIRST` probes, then as many more as it takes, up to `max_products`.
    """
    draws = _draw(matrix, blocks, generator, n_products if tol is None else max(2, min(FIRST, max_products)))
    while True:
        estimate = Estimate.of_samples(draws, len(draws), tol=tol)
        room = max_products - len(draws)
        if tol is None or estimate.converged or room < 1:
            return estimate
        n = min(more_draws(len(draws), estimate.value, estimate.sem, tol), room)
        draws = torch.cat([draws, _draw(matrix, blocks, generator, n)])


def deflated_hutchinson(
    matrix: Matrix,
    blocks: list[slice],
    subspace: Subspace,
    *,
    generator: torch.Generator,
    n_products: int = 60,
    tol: float | None = None,
    max_products: int = MAX_PRODUCTS,
) -> Estimate:
    """Random signs on what is left of the matrix outside a subspace, in which the trace is exact.

    With a `Sketch` this is Hutch++ (Meyer, Musco, Musco, Woodruff 2021).

    Args:
        matrix, blocks, generator, max_products: as for `hutchinson`.
        subspace: a new `Lanczos` or `Sketch`, which is extended here.
        n_products: without `tol`: half of them for the subspace, half for probes.
        tol: relative standard error wanted.  The subspace is doubled as long as that saves more products than it costs
            (judged by the last doubling); then probes are drawn.
    """
    largest = max(1, min(matrix.size, MAX_BASIS_BYTES // (2 * matrix.size * matrix.dtype.itemsize)))
    if tol is None:
        subspace.extend(min(largest, max(1, n_products // (2 * subspace.COST))))
        used = subspace.n_products
        draws = _draw(matrix, blocks, generator, max(2, n_products - used), subspace)
        known = subspace.traces(blocks)
        return Estimate.of_samples(draws, used + len(draws), known=known, rank=len(subspace))

    subspace.extend(min(FIRST_RANK, largest))
    # The first probes and their products are kept: when the subspace grows they are projected again, without products.
    v = random_signs(matrix, FIRST, generator)
    av = in_parts(matrix, v)
    draws = _projected(v.clone(), av.clone(), subspace, blocks)
    before = math.inf  # products that the last, smaller subspace would have taken in total
    while True:
        rank = len(subspace)
        used = subspace.n_products + len(draws)
        estimate = Estimate.of_samples(draws, used, known=subspace.traces(blocks), rank=rank, tol=tol)
        room = max_products - used
        if estimate.converged or room < 1:
            return estimate
        missing = more_draws(len(draws), estimate.value, estimate.sem, tol)
        growth = min(rank, largest - rank, room // subspace.COST)
        worth = used + missing < before and missing > subspace.COST * growth
        if growth > 0 and worth and not (subspace.ended or subspace.full) and len(draws) == FIRST:
            before = used + missing
            subspace.extend(growth)
            draws = _projected(v.clone(), av.clone(), subspace, blocks)
        else:
            more = _draw(matrix, blocks, generator, min(missing, room), subspace)
            draws = torch.cat([draws, more])


def _draw(
    matrix: Matrix, blocks: list[slice], generator: torch.Generator, n: int, subspace: Subspace | None = None
) -> Tensor:
    """(n, blocks) samples of the part outside the subspace."""
    parts = []
    for start in range(0, n, AT_ONCE):
        v = random_signs(matrix, min(AT_ONCE, n - start), generator)
        parts.append(_projected(v, matrix.products(v), subspace, blocks))
    return torch.cat(parts)


def _projected(v: Tensor, av: Tensor, subspace: Subspace | None, blocks: list[slice]) -> Tensor:
    """Samples (M v)_b . (A M v)_b, (k, blocks): unbiased for the blocks of A M, and in sum for M A M.

    Overwrites `v` and `av`.
    """
    if subspace is not None:
        inside = inner(subspace.q, v)
        v.addmm_(inside.T.to(v), subspace.q, alpha=-1)
        av -= subspace.moved(inside)
    return block_sums(v, av, blocks)


def in_parts(matrix: Matrix, v: Tensor) -> Tensor:
    """Products with the rows of (k, n), `AT_ONCE` at a time."""
    return torch.cat([matrix.products(part) for part in v.split(AT_ONCE)])
