"""What a loss is here: a mean over samples of a function of a sample's outputs and its targets."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fpq_analysis.errors import UnfitError
from fpq_analysis.nests import Nest, moved, take

# Of (outputs (B, ...), targets): the mean over the B samples.  Targets are a tensor (B, ...), or a nest of them.
LossFunction = Callable[[Tensor, Nest], Tensor]
AT_ONCE = 64  # columns of a factor that are written out at a time
SMALL = 2**10  # outputs of a sample whose factor is written out to be counted


@dataclass(frozen=True)
class Loss:
    """A mean over samples.  Called on outputs and targets of B samples, (B, ...) each, it gives that mean.

    Attributes:
        name: in records, tables and captions.
        per_sample: (outputs, targets) to the loss of each sample, (B,): differentiable, and of that sample alone.
        output_factor: (outputs, targets) to L, (K, B, ...), K vectors of the outputs' shape for each sample: their
            outer products add up to the Hessian of the sample's loss in its outputs, as far as `coupled` says.  It is
            what exact and sampled traces need; None where it is not known.
        coupled: axes of the outputs that the Hessian couples: (1,) for a softmax over classes at each position, ()
            where every output has a loss of its own.  Along the others, the positions, it is diagonal, and
            `output_factor` is that of each position, all K * P of them in K vectors.  None: all axes.
        draw: for the negative logarithm of a probability, (outputs, targets, uniforms (B, M, positions), balanced) to
            the gradients in the outputs, (M, B, ...), for targets drawn from the network's own prediction at each
            position: the mean of their outer products is that same Hessian.  `balanced` may draw from another
            distribution, weighted, for less variance.
        weights: targets to what each sample counts, (B,): the mean is then sum(per_sample) / sum(weights), as PyTorch's
            over the positions that are not ignored.  It is known from all targets only: see `for_targets`.  None: 1.
        mean: the mean in one call, for a function of which nothing more is known; None for that of `per_sample`.
        check: raises `UnfitError` unless the targets fit outputs of this shape.  A loss without it is tried out on all
            data: whether it is the mean it claims to be, and `output_factor` that of its Hessian.
        classes: (outputs, targets) to (logits (B, C, ...), labels (B, ...)), negative labels being ignored: for the
            accuracy.
        resolution: differences of outputs that matter to it, in absolute numbers; 0 where only relative ones do.
        bind: what `for_targets` does, for a loss that is made of others.
        bound: whether `weights` are relative to their mean over all data, and `per_sample` likewise.
    """

    name: str
    per_sample: LossFunction
    output_factor: LossFunction | None = None
    coupled: tuple[int, ...] | None = None
    draw: Callable[[Tensor, Nest, Tensor, bool], Tensor] | None = None
    weights: Callable[[Nest], Tensor] | None = None
    mean: LossFunction | None = None
    check: Callable[[Tensor, Nest], None] | None = None
    classes: Callable[[Tensor, Nest], tuple[Tensor, Tensor]] | None = None
    resolution: float = 0.0
    bind: Callable[[list[Nest]], Loss] | None = None
    bound: bool = False

    def __call__(self, outputs: Tensor, targets: Nest) -> Tensor:
        """The mean over the samples."""
        if self.mean is not None:
            return self.mean(outputs, targets)
        losses = self.per_sample(outputs, targets)
        if self.weights is None or self.bound:
            return losses.mean()
        return losses.sum() / self.weights(targets).sum()

    def for_targets(self, targets: Iterable[Nest]) -> Loss:
        """The same loss as a plain mean over samples, for data with these targets (a nest a batch).

        A weighted mean over all data is not the mean of those over micro-batches: a sample's share in it depends on
        the weights of all.

        Raises:
            UnfitError: if no target counts.
        """
        if self.bound or (self.bind is None and self.weights is None):
            return self
        found = list(targets)
        if self.bind is not None:
            return self.bind(found)
        assert self.weights is not None
        weights = torch.cat([wide(self.weights(some).detach()).cpu() for some in found])
        mean = float(weights.mean())
        if not 0 < mean < math.inf:
            raise UnfitError(
                f"No target counts in the loss '{self.name}': their weights add up to {mean * len(weights):g}.",
                "Look whether all targets are ignored (ignore_index), or all weights are zero.",
            )
        return self.times(1 / mean, bound=True)

    def times(self, scale: float, **changes: Any) -> Loss:
        """The same loss `scale` times."""
        root = math.sqrt(scale)
        return replace(
            self,
            per_sample=partial(_times, self.per_sample, scale),
            output_factor=self.output_factor and partial(_times, self.output_factor, root),
            draw=self.draw and partial(_times, self.draw, root),
            weights=self.weights and partial(_times, self.weights, scale),
            mean=self.mean and partial(_times, self.mean, scale),
            **changes,
        )

    def shares(self, targets: Nest) -> Tensor | None:
        """What each sample counts, (B,) float64 on the CPU, 1 in the mean over all data; None where all count alike."""
        return wide(self.weights(targets).detach()).cpu() if self.bound and self.weights is not None else None

    def sample_losses(self, outputs: Tensor, targets: Nest) -> Tensor:
        """Each sample's loss, (B,) in float64; on the CPU where the device has none."""
        if self.mean is None:  # otherwise it may know one type and one device only
            outputs = wide(outputs)
            targets = moved(targets, outputs.device)
        losses = self.per_sample(outputs, targets)
        if losses.shape != outputs.shape[:1]:
            raise UnfitError(
                f"The loss '{self.name}' gives {len(outputs)} samples losses of shape {tuple(losses.shape)}.",
                "Its per_sample must give one number for each sample.",
            )
        return wide(losses)

    # --- The Hessian in the outputs ---

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        """The axes along which the Hessian is diagonal, that of the samples aside."""
        if self.coupled is None:
            return ()
        coupled = {axis % outputs.ndim for axis in self.coupled}
        return tuple(axis for axis in range(1, outputs.ndim) if axis not in coupled)

    def n_factors(self, outputs: Tensor, targets: Nest) -> int:
        """Vectors a sample whose outer products are the Hessian: K times the number of positions."""
        assert self.output_factor is not None
        outputs, targets = take((outputs, targets), slice(1))
        columns = None
        if outputs.numel() > SMALL:  # shapes alone; of small ones numbers, as the first of those loads half of torch
            with suppress(Exception):  # what it computes needs numbers
                columns = self.output_factor(outputs.to("meta"), moved(targets, torch.device("meta")))
        if columns is None:
            columns = self.output_factor(outputs, targets)
        return len(columns) * math.prod(outputs.shape[axis] for axis in self.positions(outputs))

    def factors(self, outputs: Tensor, targets: Nest) -> Iterator[Tensor]:
        """Those vectors, (k, B, ...), some at a time."""
        assert self.output_factor is not None
        columns = self.output_factor(outputs, targets)
        axes = self.positions(outputs)
        if math.prod(outputs.shape[axis] for axis in axes) == 1:
            yield columns
            return
        for mask in _single_positions(outputs, axes, max(1, AT_ONCE // len(columns))):
            yield (columns * mask.unsqueeze(1)).flatten(0, 1)

    def drawn_factor(self, outputs: Tensor, targets: Nest, uniforms: Tensor, balanced: bool = True) -> Tensor:
        """M random vectors for each sample, (M, B, ...), whose outer products have the Hessian in the outputs as mean.

        Drawn targets where the loss has them; elsewhere columns of L, one with a chance as its squared length.  Each
        position draws its own, and a sign: so one vector serves all of them, as what it mixes is zero in the mean.

        Args:
            uniforms: (B, M) in [0, 1), see `draw_uniforms`.
            balanced: False for plain labels, which need no signs; only for losses that draw them.
        """
        axes = self.positions(outputs)
        shape = [outputs.shape[axis] for axis in axes]
        signs = None
        if math.prod(shape) == 1:
            uniforms = uniforms.reshape(*uniforms.shape, *shape)
        else:
            uniforms, signs = _of_positions(uniforms, shape)
        if self.draw is not None:
            drawn = self.draw(outputs, targets, uniforms, balanced)
        else:
            assert self.output_factor is not None
            drawn = _drawn_columns(self.output_factor(outputs, targets), uniforms, axes)
        if signs is None or (self.draw is not None and not balanced):
            return drawn
        return drawn * _at_positions(signs.movedim(1, 0), axes, drawn.ndim).to(drawn)


def stated(name: str, settings: Any) -> str:
    """The name of a loss with those settings (fields of a dataclass) that are not as usual: `cross_entropy(...)`."""
    named = [(field, getattr(settings, field.name)) for field in fields(settings)]
    unusual = [f"{field.name}={_brief(value)}" for field, value in named if value != field.default]
    return f"{name}({', '.join(unusual)})" if unusual else name


def _brief(value: Any) -> str:
    if not isinstance(value, tuple):
        return f"{value:g}"
    few = ",".join(f"{x:g}" for x in value[:8])
    return (
        f"[{few}]" if len(value) <= 8 else f"[{few},... {len(value)} numbers, {zlib.crc32(repr(value).encode()):08x}]"
    )


def draw_uniforms(n: int, n_draws: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (n, n_draws), from which a loss draws.

    They are drawn apart from what they choose, so that this does not depend on how samples are cut into micro-batches.
    """
    return torch.rand((n, n_draws), generator=generator, dtype=torch.float32)


def draw_index(chances: Tensor, uniforms: Tensor) -> Tensor:
    """(..., M) indices, each drawn with the chances (..., K), from uniform numbers (..., M)."""
    found = torch.searchsorted(chances.cumsum(-1), uniforms.to(chances).contiguous())
    return found.clamp(max=chances.shape[-1] - 1)


def _drawn_columns(columns: Tensor, uniforms: Tensor, axes: tuple[int, ...]) -> Tensor:
    """At each position one of the columns (K, B, ...), drawn with a chance as its squared length: (M, B, ...)."""
    if len(columns) == 1:
        return columns.expand(uniforms.shape[1], *columns.shape[1:])
    coupled = [axis + 1 for axis in range(1, columns.ndim - 1) if axis not in axes]
    lengths = columns.square()
    lengths = (lengths.sum(coupled) if coupled else lengths).movedim(0, -1)  # (B, positions, K)
    lengths = lengths if lengths.device.type == "mps" else lengths.double()
    chances = torch.where(lengths.sum(-1, keepdim=True) > 0, lengths, 1.0)
    chances = chances / chances.sum(-1, keepdim=True)
    which = draw_index(chances, uniforms.movedim(1, -1))  # (B, positions, M)
    scales = chances.gather(-1, which).rsqrt().to(columns).movedim(-1, 0)
    places = _at_positions(which.movedim(-1, 0), axes, columns.ndim)
    shape = len(places), *columns.shape[1:]
    return columns.gather(0, places.expand(shape)) * _at_positions(scales, axes, columns.ndim)


def _at_positions(t: Tensor, axes: tuple[int, ...], ndim: int) -> Tensor:
    """(M, B, positions) with an axis of length 1 for each that is none: to go with (M, B, ...) of `ndim` axes."""
    for axis in range(1, ndim - 1):
        if axis not in axes:
            t = t.unsqueeze(axis + 1)
    return t


def _single_positions(outputs: Tensor, axes: tuple[int, ...], at_once: int) -> Iterator[Tensor]:
    """Masks (p, 1, ...) of one position each, some at a time."""
    shape = [outputs.shape[axis] for axis in axes]
    n = math.prod(shape)
    for some in torch.arange(n, device=outputs.device).split(at_once):
        mask = torch.zeros(len(some), n, dtype=outputs.dtype, device=outputs.device)
        mask[torch.arange(len(some)), some] = 1
        yield _at_positions(mask.reshape(len(some), 1, *shape), axes, outputs.ndim + 1)


def _of_positions(uniforms: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    """From a few uniform numbers of a sample, (B, M), those of all its positions and signs: (B, M, *shape) each.

    By SplitMix64 (Steele et al. 2014), of which all M numbers of the sample are the key: a position's number depends on
    nothing else, whatever the micro-batches.
    """
    words = (uniforms * 2**24).long()  # float32 has 24 bits
    key = torch.zeros_like(words[:, :1])
    for word in words.split(1, 1):
        key = _mixed(key + word)
    draws = torch.arange(words.shape[1], device=words.device)
    start = _mixed(key + GOLDEN * (draws + 1))  # (B, M)
    places = torch.arange(math.prod(shape), device=words.device)
    bits = _mixed(start.unsqueeze(2) + GOLDEN * (places + 1))
    numbers = _shifted(bits, 40).float() / 2**24
    signs = (bits & 1) * 2 - 1
    return (t.reshape(*uniforms.shape, *shape) for t in (numbers, signs))  # type: ignore[return-value]


GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as are the others a signed number


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * -4658895280553007687
    z = (z ^ _shifted(z, 27)) * -7723592293110705685
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _times(function: Callable[..., Tensor], scale: float, *args: Any) -> Tensor:
    return function(*args) * scale


def wide(t: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (t.cpu() if t.device.type == "mps" else t).double()
