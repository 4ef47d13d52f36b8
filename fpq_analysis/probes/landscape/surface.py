"""The loss anywhere on a line or plane, for little more than a forward pass a point.

All variables lie side by side in one piece of memory, so that moving them is one addition for each axis; the data stay
on the device; weights are rounded once a point, not once a batch.  A point is w0 + a d1 + b d2 in this order, so that
the centre is w0 to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fpq_analysis.curvature.batches import full_precision
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.errors import UserError
from fpq_analysis.nests import alike, joined
from fpq_analysis.probes.landscape.directions import Move
from fpq_analysis.probes.landscape.movable import MovableNetwork
from fpq_analysis.probes.subject import Subject
from fpq_analysis.ranks import gathered, share

# Tensors in one piece of memory begin at multiples of so many scalars, as they would if they were alone.
ALIGNMENT = 64


class Surface:
    """Losses of single samples as a function of coordinates.

    Args:
        network: from now on the surface's own.
        subject: its data and loss.
        directions: moves of its variables, one for each axis.
        carried_moves: moves of what it carries along, one for each axis; none where that stays.
        re_estimate: take BatchNorm's statistics anew at every point, from all the data as one batch.
    """

    def __init__(
        self,
        network: MovableNetwork,
        subject: Subject,
        directions: Sequence[Move],
        carried_moves: Sequence[Move] = (),
        *,
        re_estimate: bool = False,
    ) -> None:
        self.network = network
        self.subject = subject
        self.batches: list[tuple[Tensor, ...]] = share(subject.data)  # `map_batches` halves these
        self.variables = _Block(network.variables, [network.transmitted(d) for d in directions])
        self.carried = _Block(network.carried, carried_moves) if carried_moves else None
        self.whole = [
            name for name in network.carried if carried_moves and _whole([network.carried, *carried_moves], name)
        ]
        norms = [m for m in network.view.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.norms = norms if re_estimate else []
        if self.norms and not all(alike(batch[0], self.batches[0][0]) for batch in self.batches):
            raise UserError(
                "BatchNorm's statistics are estimated anew from all data as one batch, and samples of several shapes "
                "make none. Use batchnorm='interpolate' (--batchnorm interpolate)."
            )

    @torch.no_grad()
    def losses(self, coordinates: Sequence[float]) -> Tensor:
        """(N,) float64 losses at a point of the surface."""
        self.variables.move(coordinates)
        if self.carried is not None:
            self.carried.move(coordinates)
            for name in self.whole:
                self.network.carried[name].round_()
            for name, floor in self.network.floors.items():
                self.network.carried[name].clamp_(min=floor)
        return self._losses()

    @torch.no_grad()
    def losses_of(self, variables: Move, carried: Move) -> Tensor:
        """(N,) losses of another network of the same form, by its variables and what it carries along."""
        for ours, theirs in ((self.network.variables, variables), (self.network.carried, carried)):
            for name, tensor in ours.items():
                tensor.copy_(theirs[name])
        return self._losses()

    def _losses(self) -> Tensor:
        for quantizer, name, weight in self.network.rounded:
            weight.copy_(quantizer(self.network.variables[name]))
        view = self.network.view
        with full_precision():
            if self.norms:
                self._re_estimate()
            losses = self.subject.loss.sample_losses
            parts = map_batches(self.batches, lambda batch: losses(view(batch[0]), batch[1]))
            return torch.cat(list(gathered(parts)))

    def _re_estimate(self) -> None:
        """One pass in which the statistics are replaced by those of the data."""
        momenta = [norm.momentum for norm in self.norms]
        try:
            for norm in self.norms:
                norm.momentum = 1.0
                norm.train()
            self.network.view(joined([batch[0] for batch in self.subject.data]))
        finally:
            for norm, momentum in zip(self.norms, momenta, strict=True):
                norm.momentum = momentum
                norm.eval()


class _Block:
    """Tensors that share one piece of memory, with their values at the centre and their moves beside it.

    The tensors keep shape and layout; what they held is copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor], directions: Sequence[Move]) -> None:
        self.parts = [
            _Part({name: t for name, t in tensors.items() if t.dtype == dtype}, directions)
            for dtype in dict.fromkeys(t.dtype for t in tensors.values())
        ]

    def move(self, coordinates: Sequence[float]) -> None:
        for part in self.parts:
            part.move(coordinates)


class _Part:
    """The tensors of one dtype."""

    def __init__(self, tensors: Mapping[str, Tensor], directions: Sequence[Move]) -> None:
        size = sum(_padded(t.numel()) for t in tensors.values())
        like = next(iter(tensors.values()))
        self.live, self.centre = (torch.zeros(size, dtype=like.dtype, device=like.device) for _ in range(2))
        self.directions = [torch.zeros_like(self.live) for _ in directions]
        start = 0
        for name, tensor in tensors.items():
            _place(self.centre, start, tensor).copy_(tensor)
            for flat, direction in zip(self.directions, directions, strict=True):
                _place(flat, start, tensor).copy_(direction[name])
            inside = _place(self.live, start, tensor)
            inside.copy_(tensor)
            tensor.data = inside
            start += _padded(tensor.numel())

    def move(self, coordinates: Sequence[float]) -> None:
        torch.add(self.centre, self.directions[0], alpha=coordinates[0], out=self.live)
        for direction, coordinate in zip(self.directions[1:], coordinates[1:], strict=True):
            self.live.add_(direction, alpha=coordinate)


def _place(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of `flat` that holds a tensor of this shape, in its layout."""
    if like.is_contiguous() or not _dense(like):
        return flat[start : start + like.numel()].view(like.shape)
    return flat.as_strided(like.shape, like.stride(), start)


def _dense(tensor: Tensor) -> bool:
    """Whether its strides leave no gap and no overlap, as those of channels-last tensors."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda axis: -strides[axis])
    return tensor.permute(order).is_contiguous()


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _whole(states: Sequence[Move], name: str) -> bool:
    return all(bool((state[name] == state[name].round()).all()) for state in states)
