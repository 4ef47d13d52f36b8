"""Arithmetic on long rows: inner products that keep float32's accuracy, and orthonormal bases.

A float32 sum of eleven million numbers, as in BLAS and `Tensor.norm`, is off by up to 2 %, and so is the orthonormality
of bases built on it.  Here a row is summed in pieces, and the pieces in float64, at the speed of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_analysis.errors import NoMemoryError, out_of_memory

# Length of the pieces that are summed in the rows' own dtype; longer ones are no faster, and less exact.
PIECE = 4096
SHORT = 512  # the same for PyTorch's own sums, which are less exact
# Rows, and bytes, that an empty basis reserves at most: not every device allocates memory only where it is written to.
FIRST_CAPACITY, FIRST_BYTES = 64, 2**30


def inner(a: Tensor, b: Tensor) -> Tensor:
    """A B^T for A (j, n) and B (k, n): (j, k) in float64 on the CPU, where small problems are solved."""
    if a.dtype == torch.float64 or a.shape[1] <= PIECE:
        return wide(a @ b.T)
    whole = a.shape[1] // PIECE * PIECE
    left = b[:, :whole].unflatten(1, (-1, PIECE)).transpose(0, 1)
    right = a[:, :whole].unflatten(1, (-1, PIECE)).permute(1, 2, 0)  # this way round it is several times faster
    return wide((left @ right).sum(0, dtype=widest(a)).T) + wide(a[:, whole:] @ b[:, whole:].T)


def norms(v: Tensor) -> Tensor:
    """Lengths of the rows of (k, n): (k,) in float64 on the CPU."""
    whole = v.shape[1] // SHORT * SHORT
    parts = torch.linalg.vector_norm(v[:, :whole].unflatten(1, (-1, SHORT)), dim=2).to(widest(v)).square().sum(1)
    return wide(parts + v[:, whole:].to(widest(v)).square().sum(1)).sqrt()


def block_sums(a: Tensor, b: Tensor, blocks: list[slice]) -> Tensor:
    """Inner products of corresponding rows of (k, n), block by block: (k, blocks) in float64 on the CPU."""
    return wide(torch.stack([_row_sums(a[:, block] * b[:, block]) for block in blocks], 1))


def _row_sums(x: Tensor) -> Tensor:
    whole = x.shape[1] // SHORT * SHORT
    parts = x[:, :whole].unflatten(1, (-1, SHORT)).sum(2)  # of float32, twenty times faster than a sum in float64
    return parts.sum(1, dtype=widest(x)) + x[:, whole:].sum(1, dtype=widest(x))


def widest(t: Tensor) -> torch.dtype:
    """The dtype for long sums: Apple's GPUs have no float64."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def wide(t: Tensor) -> Tensor:
    """`t` in float64 on the CPU."""
    return t.detach().cpu().double()


def combined(coefficients: Tensor, rows: Tensor) -> Tensor:
    """C R for coefficients C (k, m) in float64 and rows R (m, n)."""
    return coefficients.to(rows) @ rows


def no_room(rows: int, size: int) -> NoMemoryError:
    """What to say where a basis of more rows is needed than there is memory for."""
    return NoMemoryError(
        f"There is no memory for more than {rows} vectors of {size:,} numbers, and more are needed. Ask for fewer "
        "eigenvalues, steps or products, restrict the variables to some layers, or use a larger machine."
    )


class Basis:
    """Orthonormal rows in one block of memory with room for more.

    Args:
        capacity: rows reserved at first; None for what `FIRST_BYTES` hold.
        most: rows at most; the reserved memory doubles up to that.

    Attributes:
        rows: (m, n), a view.
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int | None = None,
        most: int | None = None,
    ) -> None:
        self.most = size + 1 if most is None else most
        if capacity is None:
            capacity = max(2, min(FIRST_CAPACITY, FIRST_BYTES // (size * dtype.itemsize)))
        self._size, self._dtype, self._device = size, dtype, device
        self._memory = self._empty(0)
        self.rows = self._memory
        self.reserve(min(capacity, self.most))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def capacity(self) -> int:
        """Rows that there is memory for."""
        return len(self._memory)

    def reserve(self, capacity: int) -> bool:
        """Make room for so many rows in all; where memory runs out, for fewer, and it is False.

        Then no more is taken than can be had twice, as products want memory, too.
        """
        wanted = capacity
        while capacity > self.capacity:
            try:
                if capacity < wanted:
                    self._empty(2 * capacity)
                larger = self._empty(capacity)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                capacity = (capacity + self.capacity) // 2
            else:
                larger[: len(self)] = self.rows
                self._memory, self.rows = larger, larger[: len(self)]
        return self.capacity >= wanted

    def shrink(self, capacity: int) -> None:
        """Give back the memory of all but so many rows, no fewer than there are, and have no more from now on."""
        self.most = capacity
        rows, self._memory = self.rows, self._memory[:0]
        self._memory = self._empty(capacity)
        self._memory[: len(rows)] = rows
        self.rows = self._memory[: len(rows)]

    def _empty(self, rows: int) -> Tensor:
        return torch.empty(rows, self._size, dtype=self._dtype, device=self._device)

    def room(self) -> Tensor:
        """(1, n): memory of the next row, to be computed in place.

        Raises:
            NoMemoryError: if there is none.
        """
        if len(self) == self.capacity:
            self.reserve(max(len(self) + 1, min(2 * len(self), self.most)))
        if len(self) == self.capacity:
            raise no_room(len(self), self._size)
        return self._memory[len(self) : len(self) + 1]

    def accept(self) -> None:
        """Make the content of `room()` a row; it has unit length and is orthogonal to all others."""
        self.rows = self._memory[: len(self) + 1]

    def drop(self, rows: int) -> None:
        """Keep only the first `rows`."""
        self.rows = self._memory[:rows]

    def keep(self, coefficients: Tensor) -> None:
        """Replace the rows by (k, m) orthonormal combinations of them, k <= m, in place."""
        kept = len(coefficients)
        for piece in self.rows.split(PIECE, 1):
            piece[:kept] = combined(coefficients, piece)
        self.drop(kept)

    def remove_from(self, v: Tensor, above: float = 0.0) -> Tensor:
        """Take out of the rows of `v` (k, n), in place, what lies in the basis: coefficients (m, k).

        Args:
            above: coefficients no larger, of the last rows of the basis, are left and given as zero.
        """
        coefficients = inner(self.rows, v)
        large = (coefficients.abs() > above).any(1).nonzero()
        some = int(large[-1]) + 1 if len(large) else 0
        coefficients[some:] = 0
        v.addmm_(coefficients[:some].T.to(v), self.rows[:some], alpha=-1)
        return coefficients

    def extend(self, v: Tensor) -> Tensor:
        """Add what the rows of `v` (k, n) hold outside of the basis; `v` is used up.

        Each is projected at least twice ("twice is enough", Giraud et al. 2005), and again while a projection takes
        more than half of it away, as that much of its rounding is inside the span.  A row that is rounding error by
        then is left out.

        Returns:
            R (rows of the basis now, k) with `v` = R^T times them.
        """
        tiny = 10 * torch.finfo(v.dtype).eps
        r = torch.zeros(len(self) + len(v), len(v), dtype=torch.float64)
        for column in range(len(v)):
            w = v[column : column + 1]
            before = whole = float(norms(w))
            after = before
            for sweep in range(5):
                r[: len(self), column : column + 1] += self.remove_from(w)
                after = float(norms(w))
                if after <= tiny * whole or (sweep >= 1 and after > before / 2):
                    break
                before = after
            if after > tiny * whole and after > 0:
                r[len(self), column] = after
                torch.div(w, after, out=self.room())
                self.accept()
        return r[: len(self)]
