"""SAM: Sharpness-Aware Minimization (Foret et al. 2021, arXiv:2010.01412) of a quantized network.

The gradient the optimiser gets is that at w + rho g / |g|, g the gradient at w.  What climbs are the trained weights
behind the quantizers, biases and BatchNorm's affine parameters; step sizes and their like stay where they are, as a
move of rho would take them out of all measure.  FPQ names neither rho nor the variables; rho = 0.05 is SAM's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpq_analysis.quantizers import quantizer_parameters
from fpq_analysis.training.regularizer import Regularizer


@contextmanager
def ascended(model: nn.Module, rho: float) -> Iterator[None]:
    """Inside, the weights stand at w + rho g / |g|, g what `.grad` holds on entry; then they are back to the bit.

    BatchNorm normalises by its batch inside but leaves its running statistics alone: the first pass has updated them.
    """
    own = {id(p) for p in quantizer_parameters(model)}
    weights: list[Tensor] = [p for p in model.parameters() if id(p) not in own and p.grad is not None]
    gradients = [p.grad for p in weights if p.grad is not None]
    before = [p.detach().clone() for p in weights]
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            climb = torch._foreach_mul(gradients, rho / (norm + 1e-12))
            torch._foreach_add_(weights, list(climb))
        for layer in tracking:
            layer.track_running_stats = False
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True
        with torch.no_grad():
            torch._foreach_copy_(weights, before)


class SAM(Regularizer):
    """The step takes its gradient up the hill."""

    def second_pass(self) -> AbstractContextManager[None]:
        return ascended(self.model, self.config.sam_rho)
