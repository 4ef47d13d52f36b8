"""What it will cost: short timings, scaled up."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpq_analysis.curvature import HessianOperator, NotExactError, certify
from fpq_analysis.curvature.batches import Batch
from fpq_analysis.curvature.exact import exact_passes
from fpq_analysis.curvature.memory import SHARE
from fpq_analysis.devices import free_memory
from fpq_analysis.doctor.model_under_test import prepare, same_random_state
from fpq_analysis.forward import ForwardFunction, running
from fpq_analysis.losses import LossFunction
from fpq_analysis.nests import size, take
from fpq_analysis.probes import hessian_trace

FORECAST_COLUMNS = ["measurement", "seconds", "peak MB"]
FORECAST_IMAGES = 32
# Products with single vectors that a measurement takes.
PRODUCTS = {
    "one Hessian-vector product": 1,
    "top-5 eigenvalues (about 20 products)": 20,
    "density (200 products)": 200,
}


def forecast_measurements(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | LossFunction = "cross_entropy",
    device: str | torch.device | None = None,
    seed: int = 0,
    forward: ForwardFunction | None = None,
) -> pd.DataFrame:
    """Time and memory of the usual measurements, from timings on few of the samples and linear in their number.

    Args:
        batches: as for `diagnose`; at most `FORECAST_IMAGES` of the samples are used.
        model, loss, device, seed, forward: as for `diagnose`.

    Returns:
        measurement, seconds, peak MB: memory for tensors beside the data, weights included.  The exact trace's row is
        NaN where it does not hold.
    """
    tested = prepare(model, batches, loss, device, seed, forward)
    own, where = tested.variables, tested.device
    sizes = list(map(size, tested.data))  # of the micro-batches
    few = take(tested.data[0], slice(FORECAST_IMAGES))
    with running(few[0]), torch.no_grad():
        tested.model(few[0])
    scale, wider = sum(sizes) / size(few), max(sizes) / size(few)

    def operator() -> HessianOperator:
        return HessianOperator(tested.model, tested.loss, [few], own)

    with same_random_state(where):
        seconds = peak = float("nan")
        with suppress(NotExactError):
            exact_passes(tested.model, tested.loss, few)
            certify(tested.model, [few], own, seed)
            # All of it: the checks ahead of a trace take an eighth of its time.
            trace = partial(hessian_trace, tested.model, few, loss=tested.loss, method="exact", seed=seed)
            seconds, peak = _measure(trace, where)
        rows = [("trace (exact)", seconds * scale, peak * wider)]
        vector = tested.random(torch.cat([p.detach().reshape(-1) for p in own.values()]))
        seconds, peak = _measure(lambda: operator().matvec(vector), where)
        kept = operator()  # and its graph
        later = _measure(lambda: kept.matvec(vector), where)[0]
        graphs = kept.graph_bytes * scale
        if graphs <= SHARE * free_memory(where):
            peak += graphs / wider
        else:
            later = seconds
    for name, products in PRODUCTS.items():
        basis = (products - 1) * vector.nbytes  # Lanczos keeps its vectors, for reorthogonalisation
        rows.append((name, (seconds + (products - 1) * later) * scale, peak * wider + basis))
    frame = pd.DataFrame(rows, columns=FORECAST_COLUMNS)
    frame["peak MB"] /= 2**20
    return frame


def _measure(task: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of a warm call, and bytes of tensors at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        task()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        with _Memory() as memory:
            task()
        peak = memory.peak
    start = _clock(device)
    task()
    task()
    return (_clock(device) - start) / 2, float(peak)


def _clock(device: torch.device) -> float:
    """Seconds, when the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Memory(TorchDispatchMode):
    """Counts the bytes of the tensors alive, for devices that do not count themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(output) if isinstance(t, Tensor)]:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return output

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
