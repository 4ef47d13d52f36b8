"""The same trace from PyHessian, as a cross-check (https://github.com/amirgholami/PyHessian, release 0.1).

PyHessian stops once its running mean moves little, which says nothing about the error; here it is asked for a fixed
number of probes instead, and their spread gives the standard error it does not report.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.errors import UserError
from fpq_analysis.losses import LossFunction
from fpq_analysis.nests import device_of


def pyhessian_trace_samples(
    model: nn.Module,
    loss: LossFunction,
    batches: list[Batch],
    parameters: dict[str, Tensor],
    n_products: int,
    seed: int,
) -> Tensor:
    """`n_products` samples v . H v of the trace, (n_products,) in float64.

    Args:
        model: a copy that PyHessian may leave changed (it does).
        parameters: the variables; PyHessian takes every parameter that wants a gradient, so the others are frozen.

    Raises:
        UserError: if PyHessian cannot handle the model; it fails on a parameter that the loss does not use.
    """
    from pyhessian import hessian

    wanted = {id(p) for p in parameters.values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in wanted)
    cuda = device_of(batches[0]).type == "cuda"
    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    try:
        # It draws from the global generator.
        with torch.random.fork_rng(), full_precision():
            torch.manual_seed(seed)
            samples = hessian(model, loss, cuda=cuda, **data).trace(maxIter=n_products, tol=-math.inf)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise UserError(
            f"PyHessian 0.1 cannot measure this model ({type(error).__name__}: {error}). Use the built-in engine."
        ) from error
    return torch.tensor([float(s) for s in samples], dtype=torch.float64)
