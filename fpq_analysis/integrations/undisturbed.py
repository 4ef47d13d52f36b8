"""What lets a network be measured amid its training so that the training goes on to the same bits."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, distributed, nn

from fpq_analysis.errors import UserError
from fpq_analysis.nests import raw
from fpq_analysis.quantizers.copies import eval_copy
from fpq_analysis.ranks.wrapped import unwrapped

ACCELERATED = "_original_forward"  # where accelerate keeps the forward that it puts autocast around


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, gradients can be taken; behind it every global random state is as before: torch's, numpy's, Python's."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 -- the global one
    of_devices = torch.cuda.get_rng_state_all() if cuda else []
    of_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(of_devices)
        if of_mps is not None:
            torch.mps.set_rng_state(of_mps)


def is_first_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode of the network itself, without what data parallelism, compiling and autocast put around it.

    Backward hooks are left off: they belong to the training.  Forward hooks stay, as quantizers are such.

    Raises:
        UserError: if parts of the weights are on other processes, or it cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"A {type(model).__name__} was given, and a torch.nn.Module is measured.")
    _check_whole(model)
    copied = eval_copy(unwrapped(model))
    for module in copied.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if ACCELERATED in vars(module):
            vars(module).pop("forward", None)
            del vars(module)[ACCELERATED]
    return copied


def _check_whole(model: nn.Module) -> None:
    """Raise `UserError` for weights of which this process holds a part, so that its curvature would be another."""
    for name, p in model.named_parameters():
        if type(p.data).__name__ == "DTensor" or hasattr(p, "ds_id") or type(p).__name__ == "FlatParameter":
            raise UserError(
                f"The parameter '{name}' is spread over several processes (FSDP, tensor parallelism, ZeRO-3), and here "
                "is only a part of it. Measure saved checkpoints instead: fpq-analyze watch DIR."
            )


def state_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name}:".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(raw(value))
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
