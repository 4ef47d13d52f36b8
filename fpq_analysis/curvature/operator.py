"""The Hessian of a mean loss as a linear operator on flat vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, full_precision

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Graph:
    """Gradients of one micro-batch's share of the loss, ready to be differentiated again."""

    gradients: list[Tensor]
    sources: list[int]  # places of `gradients` among the parameters


class HessianOperator:
    """H = (1/N) sum_n of the Hessian of loss_n, by differentiating the gradient once more (never by differences).

    The gradient's graph of a micro-batch is built once and used for all vectors of a product; with a single
    micro-batch it is kept for later products too.  Micro-batches count by their number of samples, so that a
    ragged last one is not overrated.

    Args:
        model: in the mode it is to be measured in; its loss must be a sum over samples (BatchNorm in eval mode).
        loss: (outputs, targets) to the *mean* over the batch.
        batches: micro-batches, on the model's device.
        parameters: the variables, by name; flat vectors hold them in this order.
    """

    def __init__(self, model: nn.Module, loss: Loss, batches: list[Batch], parameters: dict[str, Tensor]) -> None:
        self.model = model
        self.loss = loss
        self.batches = batches
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.n_data = sum(len(x) for x, _ in batches)
        self.n_products = 0
        sizes = [p.numel() for p in self.parameters]
        self.size = sum(sizes)
        self.dtype = self.parameters[0].dtype
        self.device = self.parameters[0].device
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.slices = {name: slice(end - size, end) for name, size, end in zip(self.names, sizes, ends, strict=True)}
        self._kept: _Graph | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n), n the number of scalar variables."""
        return (self.size, self.size)

    def matvec(self, v: Tensor) -> Tensor:
        """H v for a flat vector (n,)."""
        return self.matmat(v.unsqueeze(1)).squeeze(1)

    def matmat(self, v: Tensor) -> Tensor:
        """H V for (n, k); every column after the first costs about two gradients less than a rebuilt graph."""
        out = torch.zeros_like(v)
        with full_precision(), torch.enable_grad():
            for batch in self.batches:
                graph = self._graph(batch)
                for column in range(v.shape[1]):
                    self._add_product(graph, v[:, column], out[:, column])
        self.n_products += v.shape[1]
        return out

    def _graph(self, batch: Batch) -> _Graph:
        if self._kept is not None:
            return self._kept
        x, y = batch
        loss = self.loss(self.model(x), y) * (len(x) / self.n_data)
        # A parameter the loss does not use has no gradient; one it is linear in has a constant gradient.
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        used = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        graph = _Graph([g for g in gradients if g is not None and g.requires_grad], used)
        if len(self.batches) == 1:
            self._kept = graph
        return graph

    def _add_product(self, graph: _Graph, v: Tensor, out: Tensor) -> None:
        if not graph.gradients:
            return
        parts = [v[s].view_as(p) for s, p in zip(self.slices.values(), self.parameters, strict=True)]
        products = torch.autograd.grad(
            graph.gradients, self.parameters, [parts[i] for i in graph.sources], retain_graph=True, allow_unused=True
        )
        for where, product in zip(self.slices.values(), products, strict=True):
            if product is not None:
                out[where] += product.detach().reshape(-1)
