"""What the benchmarks share: a clock, peak memory, the machine, and BatchNorm statistics without training."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def seconds(task: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, up to the end of what it queued on the device."""
    _wait(device)
    start = time.perf_counter()
    task()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(tasks: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each task in each round, in the order a, b, c, a, b, c, ...

    Whatever else the machine does, and its drift, then touches all tasks alike: compare within a round.  Nothing is
    warmed up here.
    """
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            found[name].append(seconds(task, device))
    return found


def peak_memory(device: torch.device) -> int:
    """MB: on CUDA the most allocated since the last reset, otherwise the most this process was ever resident with."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def settle_batchnorm(model: nn.Module, images: Tensor) -> None:
    """Give a network with random weights the BatchNorm statistics of `images`; it is left in eval mode.

    In training mode a layer normalises by the batch, whatever its running statistics, so one pass in which these are
    replaced rather than averaged has the same end as many passes.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    model.train()(images)
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
    model.eval()


def environment(device: torch.device, *packages: str) -> dict[str, str]:
    """Machine and versions, with the load before anything is timed: call it first, print it last."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    machine = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load} at the start"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    found = [f"python {platform.python_version()}"]
    for package in ("torch", *packages):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return {"machine": machine, "versions": ", ".join(found)}


def _processor() -> str:
    """The model name, which only Linux hides in a file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Nothing for None.  What is not a number becomes null, as JSON knows no NaN."""
    if path is not None:
        path.write_text(json.dumps(_plain(content), indent=2, default=str) + "\n")


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and x != x else x
