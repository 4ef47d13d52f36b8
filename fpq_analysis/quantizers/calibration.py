"""First values of step size and zero point, from a tensor (FPQ Eq. 4-5, or a mean-squared-error search).

Both give an asymmetric grid  (k - z) s,  k = 0 .. 2^bits - 1,  with a whole zero point z.  The observed range is
widened to hold zero, as torch's own observers do, so that padding and ReLU's zero are exact; Eq. 4-5 alone does not
ensure that.

Which is the better default was measured, not assumed: see `benchmarks/calibration.py` and its figures in
`docs/calibration.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Candidates of the search: the range shrunk by these factors, the zero point moved by these whole steps.
SHRINK = [i / 50 for i in range(5, 51)]
SHIFT = (-1, 0, 1)
# More values than this do not sharpen a single scale; they are thinned evenly.
MAX_VALUES = 100_000
REFINEMENTS = 20


def minmax(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Eq. 4-5 for each row of `x` (rows, values): s = (max - min) / (2^bits - 1), z = round(-min / s).

    Returns:
        Step sizes and zero points, each (rows,).
    """
    low = x.amin(1).clamp(max=0)
    high = x.amax(1).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    # A row of zeros has no range; any positive step then represents it exactly.
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, (-low / step).round()


def mse(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The (s, z) of least squared error among shrunken ranges, for each row of `x` (rows, values).

    Returns:
        Step sizes and zero points, each (rows,).
    """
    thin = _thinned(x)
    full_step, full_zero = minmax(x, bits)
    best_step, best_zero = full_step, full_zero
    best_error = torch.full_like(full_step, float("inf"))
    levels = 2**bits - 1
    for factor in SHRINK:
        step = full_step * factor
        # Shrinking the range about zero leaves the zero point where it is; at 2 bits its neighbours are often better.
        for shift in SHIFT:
            zero = (full_zero + shift).clamp(0, levels)
            grid = torch.clamp((thin / step[:, None]).round(), -zero[:, None], levels - zero[:, None])
            error = (grid * step[:, None] - thin).square().mean(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_step = torch.where(better, step, best_step)
            best_zero = torch.where(better, zero, best_zero)
    return best_step, best_zero


def least_squares(x: Tensor, step: Tensor, offset: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Better (s, b) for the grid  k s + b,  k = 0 .. levels,  of any offset b, from those given, for each row of `x`.

    By turns the codes are rounded and s and b fitted to them by linear regression (Lloyd's algorithm on a uniform
    grid), so the squared error never grows.

    Returns:
        Step sizes and offsets, each (rows,).
    """
    thin = _thinned(x)
    mean = thin.mean(1)
    for _ in range(REFINEMENTS):
        k = ((thin - offset[:, None]) / step[:, None]).round_().clamp_(0, levels)
        centred = k - k.mean(1, keepdim=True)
        variance = centred.square().mean(1)
        # All values on one level say nothing of the step.
        step = torch.where(variance > 0, (centred * thin).mean(1) / variance.clamp(min=1e-12), step)
        offset = mean - step * k.mean(1)
    return step, offset


def _thinned(x: Tensor) -> Tensor:
    return x[:, :: -(-x.shape[1] // MAX_VALUES)]


CALIBRATIONS = {"minmax": minmax, "mse": mse}
