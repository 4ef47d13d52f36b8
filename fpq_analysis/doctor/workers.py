"""How many processes should measure at a time, and on which engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping

import pandas as pd
import psutil
import torch
from torch import nn

from fpq_analysis.curvature.batches import Batch
from fpq_analysis.devices import cores, count_gpus, free_memory, pick_device
from fpq_analysis.doctor.forecast import forecast_measurements
from fpq_analysis.forward import ForwardFunction
from fpq_analysis.losses import LossFunction

WORKERS_COLUMNS = ["device", "processes", "threads", "seconds", "memory MB", "free MB"]
WORTH = 1.1  # times as fast that several processes must be to be named


def forecast_workers(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | LossFunction = "cross_entropy",
    device: str = "auto",
    seed: int = 0,
    forward: ForwardFunction | None = None,
    alone: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """What several processes would take for each of many checkpoints, on each device that there is.

    Times are those of this process with as many threads as each would have, divided by their number: they do not know
    of memory and caches that processes share.

    Args:
        batches, loss, seed, forward: as for `forecast_measurements`.
        device: `auto` for every kind that is here, or one of them.
        alone: by device, what `forecast_measurements` found for this process, which then is not timed once more.

    Returns:
        device; processes; threads of each; seconds a checkpoint, for the exact trace or, where it does not hold, five
        eigenvalues; memory MB that all of them take where they compute, and how much is free there.
    """
    threads = torch.get_num_threads()
    known = alone or {}
    rows = []
    for where in devices(device):
        most = cores() if where.type == "cpu" else max(1, count_gpus())
        several = {1, 2 ** (most.bit_length() // 2), most}
        for processes in sorted(several):
            each = max(1, cores() // processes)
            if str(where) in known and each >= threads:
                costs = known[str(where)]
            else:
                torch.set_num_threads(min(each, threads))
                try:
                    costs = forecast_measurements(model, batches, loss=loss, device=where, seed=seed, forward=forward)
                finally:
                    torch.set_num_threads(threads)
            row = costs.iloc[0 if pd.notna(costs["seconds"].iloc[0]) else 2]
            taken, free = row["peak MB"], free_memory(where) / 2**20
            if where.type == "cpu":  # a process holds what this one does: libraries, data, weights
                taken = processes * (taken + psutil.Process().memory_info().rss / 2**20)
            rows.append((str(where), processes, each, row["seconds"] / processes, taken, free))
    return pd.DataFrame(rows, columns=WORKERS_COLUMNS)


def devices(name: str) -> list[torch.device]:
    """Those that `auto` may mean, or the one that is named."""
    if name != "auto":
        return [pick_device(name)]
    found = [pick_device("auto"), torch.device("cpu")]
    return found[:1] if found[0] == found[1] else found


def advice(workers: pd.DataFrame) -> str:
    """What to take for many checkpoints, of what `forecast_workers` found; a sentence or two."""
    fitting = workers[workers["memory MB"] <= workers["free MB"]]
    if fitting.empty:
        least = workers.sort_values("memory MB").iloc[0]
        return (
            f"Not one process fits: it would take {least['memory MB']:.0f} MB on {least['device']}, of which "
            f"{least['free MB']:.0f} are free. Measure on fewer samples (--n-data), or on a larger machine."
        )
    best = fitting.sort_values("seconds").iloc[0]
    alone = fitting[(fitting["device"] == best["device"]) & (fitting["processes"] == 1)]
    if not alone.empty and alone["seconds"].iloc[0] < WORTH * best["seconds"]:
        best = alone.iloc[0]
    jobs = f" --jobs {best['processes']}" if best["processes"] > 1 else ""
    several = "one process" if best["processes"] == 1 else f"{best['processes']} processes"
    text = (
        f"For many checkpoints: --device {best['device']}{jobs} ({several}, {best['seconds']:.2g} s a checkpoint, "
        f"{best['memory MB']:.0f} of {best['free MB']:.0f} MB)."
    )
    if shutil.which("sbatch"):
        text += " Slurm is here: --executor slurm measures them on its nodes."
    return text
