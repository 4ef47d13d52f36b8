"""The losses that are known by a name; and which one is meant by a name, a function or a `Loss`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.losses.cross_entropy import CROSS_ENTROPY
from fpq_analysis.losses.loss import Loss, LossFunction
from fpq_analysis.losses.squared_error import SQUARED_ERROR

LOSSES = {loss.name: loss for loss in (CROSS_ENTROPY, SQUARED_ERROR)}


def resolve_loss(loss: str | LossFunction) -> Loss:
    """The `Loss` that is meant: itself, one of `LOSSES` by its name, or what a function computes.

    PyTorch's function or module with default settings (`equivalents`) is the loss of the table.  Any other function
    (outputs, targets) to the mean is taken for what it computes, and has no `output_factor`.

    Raises:
        UserError: for a name that is not known.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise UserError(
                f"Unknown loss '{loss}'{did_you_mean(loss, LOSSES)}. Known: {', '.join(LOSSES)}; or give a function "
                "(outputs, targets) to the mean."
            )
        return LOSSES[loss]
    given: Any = loss
    for known in LOSSES.values():
        function, module = known.equivalents
        if given is function or (type(given) is module and repr(vars(given)) == repr(vars(module()))):
            return known
    named = given if hasattr(given, "__qualname__") else type(given)
    name = f"{named.__module__}:{named.__qualname__}"
    return Loss(name, partial(_one_by_one, loss), mean=loss)


def _one_by_one(loss: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over a batch of one is that sample's loss."""
    pairs = zip(outputs.split(1), targets.split(1), strict=True)
    return torch.stack([loss(*pair).reshape(()) for pair in pairs])
