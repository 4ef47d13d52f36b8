"""What an algorithm of this room is given: a symmetric matrix known by its products; and a dense one for trials."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fpq_analysis.errors import UserError

# Rows whose products are added up in the matrix's own type.
ROWS = 512


class Matrix(Protocol):
    """A symmetric (size, size) matrix A, through A V."""

    @property
    def size(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def matmat(self, v: Tensor) -> Tensor:
        """A V for V (size, k)."""
        ...


class DenseMatrix:
    """A matrix that is all there, and counts its products."""

    def __init__(self, a: Tensor) -> None:
        self.a = a
        self.size = len(a)
        self.dtype = a.dtype
        self.device = a.device
        self.n_products = 0

    def matmat(self, v: Tensor) -> Tensor:
        """A V for V (size, k)."""
        self.n_products += v.shape[1]
        return self.a @ v


def random_signs(matrix: Matrix, k: int, generator: torch.Generator) -> Tensor:
    """A (size, k) matrix of independent signs, in the matrix's type and place, the same on every device."""
    bits = torch.randint(0, 2, (matrix.size, k), generator=generator, device=generator.device, dtype=torch.int8)
    return bits.to(matrix.device, matrix.dtype).mul_(2).sub_(1)


def random_normal(matrix: Matrix, k: int, generator: torch.Generator) -> Tensor:
    """A (size, k) matrix of independent standard normal numbers, likewise."""
    numbers = torch.randn((matrix.size, k), generator=generator, device=generator.device)
    return numbers.to(matrix.device, matrix.dtype)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """A^T B for A (n, j) and B (n, k): (j, k) in float64 on the CPU, where small problems are solved.

    Added up in blocks of rows, and over these in float64.  In one go, the float32 sums of BLAS and of `Tensor.norm` are
    off by 7e-5 at 270,000 rows and by 2 % at eleven million: bases built on them are not orthonormal, by as much.
    """
    whole = len(a) // ROWS * ROWS
    parts = a[:whole].unflatten(0, (-1, ROWS)).transpose(1, 2) @ b[:whole].unflatten(0, (-1, ROWS))
    return wide(parts.sum(0, dtype=widest(a))) + wide(a[whole:].T @ b[whole:])


def norms(v: Tensor) -> Tensor:
    """Norms of the columns of (n, k): (k,) in float64 on the CPU, added up likewise."""
    return wide(v.square().sum(0, dtype=widest(v))).sqrt()


def widest(t: Tensor) -> torch.dtype:
    """What long sums are taken in: Apple's GPUs have no float64."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def orthonormalize(v: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal columns for the part of `v` that is outside the span of `basis`.

    Each column is projected at least twice against everything before it ("twice is enough", Giraud et al. 2005), and
    again while a projection takes more than half of it away, as that much of its rounding is inside the span.  A column
    that is rounding error by then is left out.

    Args:
        v: (n, k).
        basis: (n, m) with orthonormal columns, or None.

    Returns:
        Q (n, r) with r <= k, and R (m + r, k) with `v` = [basis, Q] R.
    """
    n, k = v.shape
    m = 0 if basis is None else basis.shape[1]
    q = v.new_empty(n, m + k)
    if basis is not None:
        q[:, :m] = basis
    r = v.new_zeros(m + k, k)
    tiny = torch.finfo(v.dtype).eps * 10
    kept = m
    for column in range(k):
        w = v[:, column : column + 1].clone()
        before = whole = float(norms(w))
        for sweep in range(5):
            share = inner(q[:, :kept], w).to(w)
            r[:kept, column] += share[:, 0]
            w -= q[:, :kept] @ share
            after = float(norms(w))
            if after <= tiny * whole or (sweep >= 1 and after > before / 2):
                break
            before = after
        if after > tiny * whole and after > 0:
            q[:, kept] = w[:, 0] / after
            r[kept, column] = after
            kept += 1
    return q[:, m:kept], r[:kept]


def check_symmetric(projected: Tensor, dtype: torch.dtype) -> None:
    """Raise `UserError` if V^T A V in float64, from products in `dtype`, is not finite or not symmetric.

    Solvers for symmetric matrices take any matrix, and give wrong numbers without a word.
    """
    if not bool(projected.isfinite().all()):
        raise UserError(
            "A product with the matrix is not finite: the loss or a derivative overflowed on these data. Check the "
            "weights and inputs for NaN, or measure in float64 (model.double(), inputs.double())."
        )
    if float((projected - projected.T).abs().max()) > 10 * torch.finfo(dtype).eps ** 0.5 * float(projected.abs().max()):
        raise UserError(
            "The matrix of second derivatives is not symmetric, so it is no Hessian: the backward of some custom "
            "autograd.Function is not the derivative of its forward. `fpq-analyze doctor` names it."
        )


def wide(t: Tensor) -> Tensor:
    """`t` in float64 on the CPU, where small problems are solved."""
    return t.detach().cpu().double()
