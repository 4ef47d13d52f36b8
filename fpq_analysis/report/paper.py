"""Tables 1-5 of the paper (Pang & Cai 2025, arXiv:2503.11159), from what was measured, beside its numbers.

A cell is the mean over seeds of the test accuracy after the last epoch; unfinished runs do not count.  Runs are
averaged only if they differ in nothing but seed and teacher; where a cell was run with several settings, the one with
most seeds is taken, of these that with most epochs, and the others are counted as left out.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fpq_analysis.errors import Fault, UserError, going_on, raise_fault
from fpq_analysis.methods import METHODS
from fpq_analysis.runs import Run, find_runs

COLUMNS = {
    "table": "1 to 5",
    "row": "the paper's name of the row",
    "bits": "WxAy, or FP",
    "data": "data set of the measured runs",
    "model": "network",
    "paper": "the paper's accuracy in %; NaN where it has none",
    "mean": "measured: test accuracy after the last epoch in %, mean over seeds; NaN where nothing was run",
    "sd": "standard deviation over seeds, from two on",
    "n": "number of seeds",
    "best": "mean over seeds of the best epoch's accuracy: chosen on the test images, so too high",
    "epochs": "of each run",
    "left_out": "finished runs of this cell with other settings, not in the mean",
    "unfinished": "runs of this cell that are not finished",
}

# One of the paper's rows: what it calls them, the method here, and the settings that make it that row.
FPQ = {"sfp_p": 0.1, "csd_weight": 1.0}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method.label: (name, {}) for name, method in METHODS.items()},
    "LSQ+SAM": ("sam", {}),
    "FPQ": ("fpq", FPQ),
    "+ perturbation": ("fpq", FPQ | {"csd_weight": 0.0}),
    "+ CSD": ("fpq", FPQ | {"sfp_p": 0.0}),
    "+ both": ("fpq", FPQ),
    **{f"p = {p:g}": ("fpq", FPQ | {"sfp_p": p}) for p in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)},
}
FOUR = ("resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2")

TABLE_4 = """
FP    FP    88.72 89.95 85.52 85.81
PACT  W4A4  88.15 85.27 80.77 79.88
LSQ   W4A4  86.69 90.01 82.39 84.45
LSQ+  W4A4  88.40 90.30 84.32 84.30
KD    W4A4  88.86 90.34 84.77 83.79
FPQ   W4A4  90.16 90.62 84.94 85.53
PACT  W2A4  87.55 85.24 69.04 67.18
LSQ   W2A4  88.36 90.01 78.15 78.15
LSQ+  W2A4  87.76 89.62 81.26 77.00
KD    W2A4  88.83 90.18 78.84 75.56
FPQ   W2A4  89.92 90.39 81.45 79.33
PACT  W2A2  76.90 64.94 11.71 10.58
LSQ   W2A2  87.60 87.79 75.29 70.32
LSQ+  W2A2  87.60 86.10 74.22 72.18
KD    W2A2  88.06 89.20 68.62 67.15
FPQ   W2A2  88.11 89.40 76.25 73.00
"""

TABLE_5 = """
FP    FP    75.40 78.94 70.22 71.30
PACT  W4A4  74.17 74.78 64.65 64.06
LSQ   W4A4  75.30 78.20 68.63 69.01
LSQ+  W4A4  74.50 77.39 67.89 68.25
KD    W4A4  74.70 78.80 70.96 71.66
FPQ   W4A4  75.84 78.80 67.55 68.24
PACT  W2A4  73.77 74.72 49.98 57.90
LSQ   W2A4  74.93 77.82 65.13 66.15
LSQ+  W2A4  73.90 76.61 65.28 66.24
KD    W2A4  74.35 77.34 66.90 63.77
FPQ   W2A4  75.77 78.11 64.68 65.35
PACT  W2A2  65.16  4.26  3.25  8.39
LSQ   W2A2  71.80 62.79 55.53 31.08
LSQ+  W2A2  71.25 64.21 55.56 30.08
KD    W2A2  73.13 63.16 55.37 28.56
FPQ   W2A2  71.73 65.23 58.46 33.16
"""


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper.

    Attributes:
        title: what it is about.
        data: its data set.
        models: its columns.
        rows: (name, bits, accuracy in % for each model).
    """

    title: str
    data: str
    models: tuple[str, ...]
    rows: list[tuple[str, str, tuple[float, ...]]]


def _parse(text: str) -> list[tuple[str, str, tuple[float, ...]]]:
    lines = (line.split() for line in text.strip().splitlines())
    return [(name, bits, tuple(float(x) for x in numbers)) for name, bits, *numbers in lines]


def _single(bits: str, accuracies: dict[str, float]) -> list[tuple[str, str, tuple[float, ...]]]:
    return [(name, bits, (accuracy,)) for name, accuracy in accuracies.items()]


PAPER = {
    1: PaperTable(
        "SAM and FPQ",
        "cifar10",
        ("resnet18", "mobilenet_v2"),
        [("FP", "FP", (88.72, 85.81)), ("LSQ+SAM", "W4A4", (89.75, 84.72)), ("FPQ", "W4A4", (90.16, 85.53))],
    ),
    2: PaperTable(
        "parts of FPQ",
        "cifar10",
        ("resnet18",),
        _single("W2A4", {"LSQ": 88.36, "+ perturbation": 89.30, "+ CSD": 89.66, "+ both": 89.92}),
    ),
    3: PaperTable(
        "probability of perturbation",
        "cifar10",
        ("resnet18",),
        _single(
            "W2A4",
            {
                **{"p = 0": 89.66, "p = 0.1": 89.92, "p = 0.3": 89.90, "p = 0.5": 89.83},
                **{"p = 0.7": 89.59, "p = 0.9": 89.68, "p = 1": 89.48},
            },
        ),
    ),
    4: PaperTable("all methods", "cifar10", FOUR, _parse(TABLE_4)),
    5: PaperTable("all methods", "cifar100", FOUR, _parse(TABLE_5)),
}


def paper_tables(ckpt_dir: str | Path, *, data: str | None = None, on_fault: Fault | None = None) -> pd.DataFrame:
    """Every cell of Tables 1-5, with what was measured at or below `ckpt_dir`.

    Networks that were run and are not in a table of the paper are added to it, without a number of the paper's.

    Args:
        data: take the runs on this data set for all tables; None: on that of each table.
        on_fault: called with each run that cannot be read and why; the others are taken.  None: raise.

    Returns:
        A row a cell; columns: `COLUMNS`.

    Raises:
        UserError: if there is no run at or below `ckpt_dir`, or none on `data`.
    """
    runs = []
    report = on_fault or raise_fault
    for folder in find_runs(ckpt_dir):
        with going_on(lambda fault, folder=folder: report(folder, fault), f"'{folder}'"):  # type: ignore[misc]
            run = Run(folder)
            _ = run.about, run.rows  # errors of a file are errors of its run alone
            runs.append(run)
    if data is not None and data not in (known := sorted({run.config["data"] for run in runs})):
        raise UserError(f"No run on '{data}' at or below '{ckpt_dir}'; there are some on {', '.join(known)}.")
    rows = []
    for number, table in PAPER.items():
        where = data or table.data
        here = [run for run in runs if run.config["data"] == where]
        methods = {ROWS[name][0] for name, _, _ in table.rows} - {"fp"}
        others = {run.config["model"] for run in here if run.config["method"] in methods} - set(table.models)
        for name, bits, accuracies in table.rows:
            for model in (*table.models, *sorted(others)):
                known_accuracy = dict(zip(table.models, accuracies, strict=True)).get(model)
                cell = [run for run in here if _is_in(run.config, name, bits, model)]
                about = {"table": number, "row": name, "bits": bits, "data": where, "model": model}
                rows.append({**about, "paper": known_accuracy, **_measured(cell)})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"paper": float, "mean": float, "sd": float, "best": float})


def _is_in(config: dict[str, Any], row: str, bits: str, model: str) -> bool:
    method, settings = ROWS[row]
    return (
        config["model"] == model
        and config["method"] == method
        and config.get("quantizer") is None  # the method's own
        and (config["bits"] or "FP").upper() == bits
        and all(config.get(key) == value for key, value in settings.items())
    )


def _measured(cell: list[Run]) -> dict[str, Any]:
    finished = [
        run for run in cell if run.finished and run.last_accuracy is not None and run.last_epoch in run.checkpoints
    ]
    kinds: dict[str, list[Run]] = {}
    for run in finished:
        kinds.setdefault(run.kind, []).append(run)
    # A seed that is there twice (copied, or in two folders) counts once.
    groups = [list({run.config["seed"]: run for run in group}.values()) for group in kinds.values()]
    unfinished = len(cell) - len(finished)
    if not groups:
        return {"n": 0, "left_out": 0, "unfinished": unfinished}
    group = max(groups, key=lambda group: (len(group), group[0].config["epochs"]))
    last = [100 * run.last_accuracy for run in group if run.last_accuracy is not None]
    return {
        "mean": statistics.mean(last),
        "sd": statistics.stdev(last) if len(last) > 1 else None,
        "n": len(last),
        "best": statistics.mean(100 * run.best_accuracy for run in group if run.best_accuracy is not None),
        "epochs": group[0].config["epochs"],
        "left_out": len(finished) - len(kinds[group[0].kind]),
        "unfinished": unfinished,
    }
