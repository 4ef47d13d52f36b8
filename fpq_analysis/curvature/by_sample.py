"""Squared norms of the samples' gradients, for layers of any kind: sample by sample."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.layers import check_rows
from fpq_analysis.nests import Nest, split


class SampleBySample:
    """To be used as a `Recorder`, with parameters that want gradients.

    Layers are attention, embeddings, tied weights or whatever autograd differentiates once.
    """

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters
        self.outputs: list[Tensor] = []

    def __enter__(self) -> SampleBySample:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def run(self, model: nn.Module, x: Nest) -> Tensor:
        """The outputs (B, ...), each with a graph of its own."""
        self.outputs = [check_rows(model(one), 1) for one in split(x, 1)]
        return torch.cat(self.outputs)

    def squared_norms(self, outputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """As `Recorder.squared_norms`."""
        variables = list(self.parameters.values())
        norms = torch.zeros(len(variables), len(self.outputs), dtype=torch.float64)
        for n, z in enumerate(self.outputs):
            for cotangent in cotangents[:, n : n + 1] if z.requires_grad else ():
                found = torch.autograd.grad(z, variables, cotangent, retain_graph=True, allow_unused=True)
                norms[:, n] += torch.stack(
                    [torch.zeros((), dtype=torch.float64) if g is None else _square(g).cpu().double() for g in found]
                )
        return dict(zip(self.parameters, norms, strict=True))


def _square(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g).square()
