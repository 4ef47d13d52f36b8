"""What the Hessian has beside the Gauss-Newton matrix: the curvature of the network itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.graph import graph_signature, prove, requiring_grad
from fpq_analysis.curvature.operator import HessianOperator
from fpq_analysis.nests import size


class ResidualOperator(HessianOperator):
    """R = H - G = (1/N) sum_n sum_c (d loss_n / d z_nc) (Hessian of z_nc), at the price of H.

    It is the Hessian of the outputs weighted by the slopes of the loss, which are held.
    """

    def _graph(self, batch: tuple[Tensor, ...]) -> list[tuple[int, Tensor]]:
        x, y = batch
        z = self.model(x)
        if not z.requires_grad:
            return []
        held = z.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(self.loss(held, y) * (size(x) / self.n_data), held)
        gradients = torch.autograd.grad(z, self.parameters, slopes, create_graph=True, allow_unused=True)
        return [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]


def curved(model: nn.Module, batches: list[Batch], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters in which the outputs for these data are not proven to be piecewise linear.

    On the diagonal of R those of the others are zero.
    """
    found: set[str] = set()
    seen = set()  # another batch may take another way through the model
    with full_precision(), torch.enable_grad(), requiring_grad(model, parameters.values()):
        for x, _ in batches:
            graph = graph_signature(model(x))
            if graph not in seen:
                prove(model, lambda x=x: model(x), lambda: parameters, found)  # type: ignore[misc]
                seen.add(graph)
    return {name: p for name, p in parameters.items() if name in found}
