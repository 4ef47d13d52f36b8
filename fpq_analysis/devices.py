"""Which device to compute on, how many there are, and how much of its memory is free or was taken."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
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


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus() -> int:
    """CUDA devices that this process sees."""
    return torch.cuda.device_count()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on the CPU no more than the control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # another system, or "max": no limit of its own
        return free


def peak_memory() -> int:
    """Peak memory of this process so far, in MB: CUDA's if it was used, else the machine's.

    0 where the system does not say (Windows).
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() // 2**20
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)
