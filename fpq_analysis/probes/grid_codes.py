"""A quantized weight as whole numbers on its grid, and the bits of these that might flip."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from fpq_analysis.quantizers import Quantizer

# Of one bit of one code: the weight's name, the place in it when it is flattened, the bit.
Flip = tuple[str, int, int]


@dataclass(frozen=True)
class Grid:
    """A quantized weight by its codes k: its values are (k - z) s.

    Attributes:
        codes: whole numbers 0 .. 2^bits - 1, of the weight's shape, contiguous.
        step, zero: s and z, broadcastable to it.
    """

    codes: Tensor
    step: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def of(cls, weight: Tensor, quantizer: Quantizer) -> Grid:
        """The codes of a weight that is on the quantizer's grid."""
        step, zero = quantizer.step_size.detach().to(weight), quantizer.zero_point.to(weight)
        return cls((weight / step + zero).round().long().contiguous(), step, zero, quantizer.bits)

    def flipped(self, place: int, bit: int) -> Tensor:
        """The weight with one bit of one code flipped.

        The same as in storage by two's complement, k - 2^(bits-1): the two differ in the top bit only, for every k.
        """
        codes = self.codes.clone()
        codes.view(-1)[place] ^= 1 << bit
        return (codes.to(self.step.dtype) - self.zero) * self.step

    def flip_moves(self, bit: int) -> Tensor:
        """How far flipping this bit moves each weight, signed."""
        return (1 - 2 * (self.codes >> bit & 1)) * 2**bit * self.step


def random_flips(grids: dict[str, Grid], n: int, seed: int) -> tuple[list[Flip], Tensor]:
    """Flips by importance sampling: what counts are top bits and small first and last layers, and both are rare.

    A layer, all with equal chance; a weight of it, likewise; a bit, with a chance half equal and half as 2^bit.

    Returns:
        The flips; and (n,) weights, with which a mean is that over all weights alike and then over the weight's bits.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(grid.codes.numel() for grid in grids.values())
    flips, weights = [], []
    for layer in torch.randint(len(grids), (n,), generator=generator).tolist():
        name, grid = list(grids.items())[layer]
        size = grid.codes.numel()
        powers = 2.0 ** torch.arange(grid.bits)
        chances = (1 / grid.bits + powers / powers.sum()) / 2
        place = int(torch.randint(size, (), generator=generator))
        bit = int(torch.multinomial(chances, 1, generator=generator))
        flips.append((name, place, bit))
        weights.append(len(grids) * size / total / (grid.bits * float(chances[bit])))
    return flips, torch.tensor(weights, dtype=torch.float64)


def likely_worst_flips(grids: dict[str, Grid], gradient: dict[str, Tensor], most: int) -> list[Flip]:
    """The flips of the largest |g times move|, whose sign does not matter: for a large move curvature decides it."""
    found: list[tuple[float, Flip]] = []
    for name, grid in grids.items():
        for bit in range(grid.bits):
            scores = (gradient[name] * grid.flip_moves(bit)).abs().flatten()
            top = scores.topk(min(most, len(scores)))
            best = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            found += [(score, (name, place, bit)) for score, place in best]
    return [flip for _, flip in heapq.nlargest(most, found)]
