"""Custom `autograd.Function`s, which no table knows, tried out by themselves: are they piecewise linear?"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from fpq_analysis.curvature.operations import Fault

# Where they are tried: at their own arguments moved so far, and at random ones, of every size and evenly up to TEN.
MOVES = (0.0, 1e-3, 1.0)
TEN = 10.0
FEWEST = 2**10  # random numbers to try an argument at, in so many calls at most
CALLS = 16
# Where a slope becomes another is narrowed down in arguments of no more numbers than that (the calls add up).
HALVINGS = 40
MOST = 2**16
FLAT = 1e-10  # relative to the slope


def fault_of_function(function: Any, call: tuple[Any, ...] | None, inputs: list[int]) -> Fault | None:
    """As `_fault`: along the inputs that share a variable together, with the others held.

    A Function may name the arguments in which it is piecewise linear, `piecewise_linear_in = (0, 2)`, and is then not
    tried along these: its word is taken.
    """
    declared = getattr(function, "piecewise_linear_in", ())
    every = reduce(or_, inputs)
    label = f"the Function '{function.__name__}'"
    if call is None:
        return label, "was not seen when it was called, and depends on", every
    tensors = [i for i, a in enumerate(call) if isinstance(a, Tensor)]
    if len(tensors) != len(inputs):
        return label, "has inputs other than its arguments, and depends on", every
    bits = [1 << i for i in range(every.bit_length()) if every >> i & 1]
    groups: dict[tuple[int, ...], int] = {}
    for bit in bits:
        together = tuple(i for i, depends in zip(tensors, inputs, strict=True) if depends & bit)
        groups[together] = groups.get(together, 0) | bit
    for together, which in groups.items():
        if set(together) <= set(declared):
            continue
        try:
            bent = _bends(function, call, together)
        except Exception as error:  # the user's code: anything can happen
            first = str(error).strip().partition("\n")[0]
            why = f"cannot be tried out in float64 ({type(error).__name__}: {first}), and depends on"
            return label, why, which
        if bent:
            return label, "is curved in what depends on", which
    return None


def _bends(function: Any, call: tuple[Any, ...], places: tuple[int, ...]) -> bool:
    """Whether the second derivative in the arguments at these places, taken together, is found not to vanish.

    In float64; points and directions are of absolute size, so that zeros move and tiny arguments move far.
    """
    generator = torch.Generator().manual_seed(0)

    def wide(t: Tensor) -> Tensor:
        where = "cpu" if t.device.type == "mps" else t.device
        return t.detach().to(where, torch.float64 if t.is_floating_point() else t.dtype, copy=True)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    def even(like: Tensor) -> Tensor:
        return TEN * (2 * torch.rand(like.shape, generator=generator, dtype=like.dtype) - 1).to(like.device)

    weights: list[Tensor] = []

    def look(point: list[Tensor]) -> tuple[list[Tensor], bool]:
        """The slopes at a point, and whether they change."""
        args = [wide(a) if isinstance(a, Tensor) else a for a in call]
        leaves = [t.clone().requires_grad_() for t in point]
        for i, leaf in zip(places, leaves, strict=True):
            args[i] = leaf.view_as(leaf)  # it may work in place
        found = function.apply(*args)
        outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Tensor)]
        outputs = [t for t in outputs if t.requires_grad]
        if not weights:
            weights.extend(map(random, outputs))
        slopes = torch.autograd.grad(outputs, leaves, weights, create_graph=True, materialize_grads=True)
        largest = max(float(t.detach().abs().max()) for t in slopes)
        bends = [torch.zeros(())]
        curved = [t for t in slopes if t.requires_grad]
        if curved:
            along = [random(t) for t in curved]
            bends = list(torch.autograd.grad(curved, leaves, along, materialize_grads=True))
        bent = not max(float(t.abs().max()) for t in bends) <= FLAT * largest
        return [t.detach() for t in slopes], bent

    here = [wide(call[i]) for i in places]
    numbers = min(max(t.numel(), 1) for t in here)
    points = [[t + size * random(t) for t in here] for size in MOVES]
    for _ in range(min(CALLS, -(-FEWEST // numbers))):
        points += [[even(t) for t in here], [random(t).sign() * 10 ** (even(t) / 2) for t in here]]
    if any(look(point)[1] for point in points):
        return True
    if max(t.numel() for t in here) > MOST:
        return False
    # A bend however narrow lies between two slopes; each number is narrowed down by itself.
    for _ in range(2):
        low, high = ([even(t) for t in here] for _ in range(2))
        slopes_low, slopes_high = look(low)[0], look(high)[0]
        for _ in range(HALVINGS):
            middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
            slopes, bent = look(middle)
            if bent:
                return True
            below = [(s - a).abs() > (b - s).abs() for a, s, b in zip(slopes_low, slopes, slopes_high, strict=True)]
            low, slopes_low = _chosen(below, low, middle), _chosen(below, slopes_low, slopes)
            high, slopes_high = _chosen(below, middle, high), _chosen(below, slopes, slopes_high)
    return False


def _chosen(where: list[Tensor], these: list[Tensor], those: list[Tensor]) -> list[Tensor]:
    return [torch.where(*each) for each in zip(where, these, those, strict=True)]
