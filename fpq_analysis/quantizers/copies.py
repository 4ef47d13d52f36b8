"""A copy of a network to measure, as the one handed over stays untouched."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fpq_analysis.errors import UserError


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode.

    Raises:
        UserError: if it cannot be copied, or inference mode is on.
    """
    if torch.is_inference_mode_enabled():
        raise UserError("Nothing can be differentiated inside torch.inference_mode(). torch.no_grad() is no hindrance.")
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:  # whatever hangs on the user's network
        what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].partition('.  ')[0].rstrip('.')}"
        raise UserError(
            f"The network cannot be copied ({what}), and only a copy is measured. {_cure(model)}"
        ) from error


def _cure(model: nn.Module) -> str:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                return (
                    f"'{f'{name}.{key}'.lstrip('.')}' is a result of a forward pass, with its graph: run the model "
                    "once under torch.no_grad() before."
                )
    return "Does it keep outputs, files or a trainer among its attributes or hooks? Give the part without these."
