"""The squared error, a mean over samples and over the outputs of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.errors import UnfitError
from fpq_analysis.losses.loss import Loss


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    """(B,) means over a sample's outputs."""
    return (outputs - targets).square().reshape(len(outputs), -1).mean(1)


def factor(outputs: Tensor, targets: Tensor) -> Tensor:
    """The Hessian is 2/K times the identity, K the number of a sample's outputs: (K, B, ...) scaled unit vectors."""
    k = outputs[0].numel()
    unit = torch.eye(k, dtype=outputs.dtype, device=outputs.device) * (2 / k) ** 0.5
    return unit.reshape(k, 1, *outputs.shape[1:]).expand(k, *outputs.shape)


def check(outputs: Tensor, targets: Tensor) -> None:
    """Raise `UnfitError` unless there is one target an output."""
    if outputs.shape != targets.shape or targets.is_complex() or targets.dtype == torch.bool:
        raise UnfitError(
            f"The squared error wants a target for each output, a real number: outputs are {tuple(outputs.shape)}, and "
            f"targets {tuple(targets.shape)} of type {targets.dtype}.",
            "Bring the targets into the outputs' shape and type.",
        )


SQUARED_ERROR = Loss("squared_error", per_sample, factor, check=check, equivalents=(F.mse_loss, nn.MSELoss))
