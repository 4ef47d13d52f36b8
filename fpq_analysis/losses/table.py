"""The losses that are known by a name; and which one is meant by a name, a function, a module or a `Loss`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.choices import check_loss_name
from fpq_analysis.errors import UserError
from fpq_analysis.losses.binary_cross_entropy import BINARY_CROSS_ENTROPY, binary_cross_entropy
from fpq_analysis.losses.cross_entropy import CROSS_ENTROPY, cross_entropy
from fpq_analysis.losses.distillation import DISTILLATION
from fpq_analysis.losses.loss import Loss, LossFunction
from fpq_analysis.losses.squared_error import SQUARED_ERROR
from fpq_analysis.losses.tokens import CAUSAL_LM, TOKEN_CLASSIFICATION
from fpq_analysis.nests import Nest, split
from fpq_analysis.references import find

LOSSES = {
    loss.name: loss
    for loss in (CROSS_ENTROPY, SQUARED_ERROR, BINARY_CROSS_ENTROPY, CAUSAL_LM, TOKEN_CLASSIFICATION, DISTILLATION)
}
# PyTorch's modules and functions: what makes our loss of the settings of these names.
PYTORCH: dict[Any, tuple[Callable[..., Loss], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (cross_entropy, ("weight", "ignore_index", "label_smoothing")),
    F.cross_entropy: (cross_entropy, ("weight", "ignore_index", "label_smoothing")),
    nn.BCEWithLogitsLoss: (binary_cross_entropy, ("weight", "pos_weight")),
    F.binary_cross_entropy_with_logits: (binary_cross_entropy, ("weight", "pos_weight")),
    nn.MSELoss: (lambda: SQUARED_ERROR, ()),
    F.mse_loss: (lambda: SQUARED_ERROR, ()),
}


def resolve_loss(loss: str | LossFunction) -> Loss:
    """The `Loss` that is meant: itself, one of `LOSSES` by its name, or what a function computes.

    PyTorch's cross-entropy, binary cross-entropy with logits and squared error are those of this package, whatever
    their settings, if they are a mean: as a module, a function, or a `functools.partial` of the function.  Any other
    function (outputs, targets) to the mean is taken for what it computes, and has no `output_factor`.  A name with a
    colon, `package.module:name`, is imported.

    Raises:
        UserError: for a name that is not known, or cannot be imported.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if ":" in loss:
            return resolve_loss(find(loss, "loss"))
        check_loss_name(loss)
        return LOSSES[loss]
    known = _of_pytorch(loss)
    if known is not None:
        return known
    if not callable(loss):
        raise UserError(
            f"The loss is a {type(loss).__name__}. Give a name ({', '.join(LOSSES)}), a Loss, or a function (outputs, "
            "targets) to the mean."
        )
    given: Any = loss
    named = given if hasattr(given, "__qualname__") else type(given)
    name = f"{named.__module__}:{named.__qualname__}"
    return Loss(name, partial(_one_by_one, loss), mean=loss)


def _of_pytorch(given: Any) -> Loss | None:
    """Ours for PyTorch's, if it is a mean."""
    settings: dict[str, Any] = {}
    if isinstance(given, nn.Module):
        kind: Any = type(given)
        settings = dict(vars(given), **given._buffers)
    elif isinstance(given, partial) and not given.args:
        kind, settings = given.func, dict(given.keywords)
    else:
        kind = given
    build, names = PYTORCH.get(kind, (None, ())) if kind.__hash__ is not None else (None, ())
    if build is None or settings.pop("reduction", "mean") != "mean":
        return None
    if not isinstance(given, nn.Module) and not settings.keys() <= set(names):
        return None
    found = {name: settings[name] for name in names if settings.get(name) is not None}
    if build is binary_cross_entropy and any(t.ndim > 1 for t in found.values()):
        return None  # weights of single outputs, not of labels
    return build(**found)


def _one_by_one(loss: LossFunction, outputs: Tensor, targets: Nest) -> Tensor:
    """The mean over a batch of one is that sample's loss."""
    return torch.stack([loss(*pair).reshape(()) for pair in split((outputs, targets), 1)])
