"""The squared error, a mean over samples and over the outputs of each."""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_analysis.errors import UnfitError
from fpq_analysis.losses.loss import Loss
from fpq_analysis.nests import Nest, described


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    """(B,) means over a sample's outputs."""
    return (outputs - targets).square().reshape(len(outputs), -1).mean(1)


def factor(outputs: Tensor, targets: Tensor) -> Tensor:
    """The Hessian is 2/K times the identity, K the number of a sample's outputs: (1, B, ...)."""
    return torch.full_like(outputs, (2 / outputs[0].numel()) ** 0.5).unsqueeze(0)


def check(outputs: Tensor, targets: Nest) -> None:
    """Raise `UnfitError` unless there is one target an output."""
    real = isinstance(targets, Tensor) and not targets.is_complex() and targets.dtype != torch.bool
    if not real or outputs.shape != targets.shape:
        raise UnfitError(
            f"The squared error wants a target for each output, a real number: outputs are {tuple(outputs.shape)}, and "
            f"targets of {described(targets)}.",
            "Bring the targets into the outputs' shape and type.",
        )


SQUARED_ERROR = Loss("squared_error", per_sample, factor, (), check=check)
