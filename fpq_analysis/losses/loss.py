"""What a loss is here: a mean over samples of a function of a sample's outputs and its targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpq_analysis.errors import UnfitError

# Of (outputs (B, ...), targets (B, ...)): the mean over the B samples.
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A mean over samples.  Called on outputs and targets of B samples, (B, ...) each, it gives that mean.

    Attributes:
        name: in records, tables and captions.
        per_sample: (outputs, targets) to the loss of each sample, (B,): differentiable, and of that sample alone.
        output_factor: (outputs, targets) to L, (K, B, ...), K vectors of the outputs' shape for each sample: their
            outer products add up to the Hessian of the sample's loss in its outputs.  It is what exact and sampled
            traces need; None where it is not known.
        draw: for the negative logarithm of a probability, (outputs, uniforms (B, M), balanced) to the gradients in the
            outputs, (M, B, ...), for targets drawn from the network's own prediction: the mean of their outer products
            is that same Hessian.  `balanced` may draw from another distribution, weighted, for less variance.
        mean: the mean in one call, for a function of which nothing more is known; None for the mean of `per_sample`.
        check: raises `UnfitError` unless the targets fit outputs of this shape.  A loss without it is tried out on all
            data: whether it is the mean it claims to be, and `output_factor` that of its Hessian.
        resolution: differences of outputs that matter to it, in absolute numbers; 0 where only relative ones do.
        equivalents: a function and a module class of PyTorch that compute the same with their default arguments.
    """

    name: str
    per_sample: LossFunction
    output_factor: LossFunction | None = None
    draw: Callable[[Tensor, Tensor, bool], Tensor] | None = None
    mean: LossFunction | None = None
    check: Callable[[Tensor, Tensor], None] | None = None
    resolution: float = 0.0
    equivalents: tuple[Any, Any] = (None, None)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the samples."""
        return self.per_sample(outputs, targets).mean() if self.mean is None else self.mean(outputs, targets)

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Each sample's loss, (B,) in float64; on the CPU where the device has none."""
        if self.mean is None:  # otherwise it may know one type and one device only
            outputs = _wide(outputs)
            targets = targets.to(outputs.device)
        losses = self.per_sample(outputs, targets)
        if losses.shape != outputs.shape[:1]:
            raise UnfitError(
                f"The loss '{self.name}' gives {len(outputs)} samples losses of shape {tuple(losses.shape)}.",
                "Its per_sample must give one number for each sample.",
            )
        return _wide(losses)

    def drawn_factor(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """M random vectors for each sample, (M, B, ...), whose outer products have the Hessian in the outputs as mean.

        Drawn targets where the loss has them; elsewhere columns of L, one with a chance as its squared length.

        Args:
            uniforms: (B, M) in [0, 1), see `draw_uniforms`.
        """
        if self.draw is not None:
            return self.draw(outputs, uniforms, True)
        assert self.output_factor is not None
        columns = self.output_factor(outputs, targets)
        weights = columns.flatten(2).square().sum(2).T.double()  # (B, K)
        chances = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
        chances = chances / chances.sum(1, keepdim=True)
        which = draw_index(chances, uniforms)  # (B, M)
        scales = chances.gather(1, which).rsqrt().to(columns)
        drawn = columns.movedim(1, 0)[torch.arange(len(which), device=which.device)[:, None], which]
        return (drawn * scales.reshape(*scales.shape, *[1] * (columns.ndim - 2))).movedim(1, 0)


def draw_uniforms(n: int, n_draws: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (n, n_draws), from which a loss draws.

    They are drawn apart from what they choose, so that this does not depend on how samples are cut into micro-batches.
    """
    return torch.rand((n, n_draws), generator=generator, dtype=torch.float32)


def draw_index(chances: Tensor, uniforms: Tensor) -> Tensor:
    """(B, M) indices, each drawn with the chances of its row, (B, K), from uniform numbers (B, M)."""
    return torch.searchsorted(chances.cumsum(1), uniforms.to(chances).contiguous()).clamp(max=chances.shape[1] - 1)


def _wide(t: Tensor) -> Tensor:
    return (t.cpu() if t.device.type == "mps" else t).double()
