"""A copy of a network to measure, as the one handed over stays untouched."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fpq_analysis.errors import UserError


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode.

    Raises:
        UserError: if it cannot be copied, or inference mode is on.
    """
    if torch.is_inference_mode_enabled():
        raise UserError("Nothing can be differentiated inside torch.inference_mode(). torch.no_grad() is no hindrance.")
    try:
        return in_eval_mode(copy.deepcopy(model))
    except Exception as error:  # whatever hangs on the user's network
        what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].partition('.  ')[0].rstrip('.')}"
        raise UserError(
            f"The network cannot be copied ({what}), and only a copy is measured. {_cure(model)}"
        ) from error


# Where the nodes of an exported graph say that they are of training.
TRAINING = {torch.ops.aten.batch_norm.default: 5, torch.ops.aten.dropout.default: 2}


def in_eval_mode(model: nn.Module) -> nn.Module:
    """`model` itself, in eval mode; exported graphs, too, whose own `eval()` may raise, give nothing or do nothing."""
    if not isinstance(model, GraphModule):
        return model.eval()
    nn.Module.train(model, False)
    for node in model.graph.nodes:
        place = TRAINING.get(node.target)
        if place is not None and node.args[place]:
            node.update_arg(place, False)
    model.recompile()
    return model


def _cure(model: nn.Module) -> str:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                return (
                    f"'{f'{name}.{key}'.lstrip('.')}' is a result of a forward pass, with its graph: run the model "
                    "once under torch.no_grad() before."
                )
    return "Does it keep outputs, files or a trainer among its attributes or hooks? Give the part without these."
