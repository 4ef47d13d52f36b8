"""The interface of a symmetric matrix known by its products, and a dense matrix behind it for tests.

Vectors are rows, here and everywhere: with k vectors of n numbers in one block of memory, operations on a single vector
are contiguous.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fpq_analysis.errors import UserError


class Matrix(Protocol):
    """A symmetric (size, size) matrix A, through its products with vectors."""

    @property
    def size(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def products(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """A v for every row v of (k, size): (k, size), in `out` where it is given; the caller may overwrite it."""
        ...


def give_way(matrix: Matrix) -> bool:
    """Let a matrix that has a method `release` free what it keeps for later products; whether that was anything."""
    return bool(getattr(matrix, "release", bool)())


class DenseMatrix:
    """A matrix `a`, (n, n), in memory, that counts its products."""

    def __init__(self, a: Tensor) -> None:
        self.a = a
        self.size = len(a)
        self.dtype = a.dtype
        self.device = a.device
        self.n_products = 0

    def products(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """A v for every row v of (k, size)."""
        self.n_products += len(v)
        return torch.mm(v, self.a.T, out=out)


def random_signs(matrix: Matrix, k: int, generator: torch.Generator) -> Tensor:
    """(k, size) independent signs, of the matrix's dtype and device; the numbers depend on the generator alone."""
    bits = torch.randint(0, 2, (k, matrix.size), generator=generator, device=generator.device, dtype=torch.int8)
    return bits.to(matrix.device, matrix.dtype).mul_(2).sub_(1)


def random_normal(matrix: Matrix, k: int, generator: torch.Generator) -> Tensor:
    """(k, size) independent standard normal numbers, likewise."""
    numbers = torch.randn((k, matrix.size), generator=generator, device=generator.device, dtype=torch.float32)
    return numbers.to(matrix.device, matrix.dtype)


def check_symmetric(projected: Tensor, dtype: torch.dtype) -> None:
    """Raise `UserError` if Q A Q^T in float64, from products in `dtype`, is not finite or not symmetric.

    Solvers for symmetric matrices accept any matrix, and silently give wrong numbers.
    """
    if not bool(projected.isfinite().all()):
        raise UserError(
            "A product with the matrix is not finite: the loss or a derivative overflowed on these data. Check the "
            "weights and inputs for NaN, or measure in float64 (model.double(), inputs.double())."
        )
    if float((projected - projected.T).abs().max()) > 10 * torch.finfo(dtype).eps ** 0.5 * float(projected.abs().max()):
        raise UserError(
            "The matrix of second derivatives is not symmetric, so it is no Hessian: the backward of some custom "
            "autograd.Function is not the derivative of its forward (`fpq-analyze doctor` names it), or the model "
            "computes something in half precision."
        )
