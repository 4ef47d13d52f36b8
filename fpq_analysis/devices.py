"""Which device to compute on."""

from __future__ import annotations

import torch

from fpq_analysis.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` (CUDA, then Apple's MPS, then the CPU), or any name torch knows that is present here.

    Raises:
        UserError: if the name is unknown or the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device '{name}' is not available here. Use --device auto, cpu, cuda, cuda:N or mps."
        ) from error
    return device
