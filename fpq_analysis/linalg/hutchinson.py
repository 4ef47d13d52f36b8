"""Hutchinson's trace estimator (Hutchinson 1990), with its standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def rademacher(size: int, k: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A (size, k) matrix of independent signs."""
    bits = torch.randint(0, 2, (size, k), generator=generator, device=generator.device)
    return bits.to(dtype).mul_(2).sub_(1)


def hutchinson(
    matmat: Callable[[Tensor], Tensor],
    size: int,
    blocks: list[slice],
    *,
    rounds: list[int],
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Draw probes v of random signs and yield the parts v_b . (A v)_b of v . A v, a round at a time.

    Each part is an unbiased sample of the trace of its diagonal block, their sum one of the trace of A.  Signs have
    the least variance among independent entries: 2 sum_{i != j} A_ij^2 for a symmetric A.

    Args:
        matmat: (size, k) to (size, k).
        blocks: slices of the vector that do not overlap.
        rounds: number of probes in each round.

    Yields:
        (probes of the round, len(blocks)) in float64.
    """
    for k in rounds:
        v = rademacher(size, k, generator, dtype)
        products = v * matmat(v)
        wide = torch.float32 if products.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        yield torch.stack([products[block].sum(0, dtype=wide) for block in blocks], dim=1).cpu().double()
