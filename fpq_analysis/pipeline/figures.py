"""From a folder of checkpoints to figures: measure what a figure needs and is not there yet, then draw it from records.

With `measure=False` only records are read: no checkpoint, no data set and no torch is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd

from fpq_analysis import records as rec
from fpq_analysis.errors import Fault, NothingToDraw, UserError, did_you_mean, going_on, raise_fault
from fpq_analysis.plots import FIGURES, Drawing
from fpq_analysis.plots.style import look
from fpq_analysis.runs import source_of
from fpq_analysis.text import written

PAPER = tuple(name for name in FIGURES if name.isdigit())
ALL = "all"


def draw_figures(
    ckpt_dir: str | os.PathLike[str],
    figures: str | Iterable[str] = ALL,
    out: str | Path = "figures",
    *,
    measure: bool = True,
    n_data: int = 1024,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    model: str | None = None,
    records: str | os.PathLike[str] | None = None,
    runs: str | Iterable[str] | None = None,
    columns: int = 2,
    labels: Mapping[str, str] | None = None,
    on_fault: Fault | None = None,
    log: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Draw figures of the runs at or below `ckpt_dir`, each as .png, .pdf and, its caption, .txt.

    Args:
        ckpt_dir: as for `measure`.
        figures: `1` to `5` (the paper's), other keys of `plots.FIGURES`, or `all`: the paper's, and of the others those
            that were measured.
        out: folder that they are written to.
        measure: measure first what is missing, with each probe's default settings; otherwise records alone are read,
            and of several settings those of most checkpoints are drawn.
        n_data, seed, device, data_root, model, records: as for `measure`.
        runs: patterns of runs' names (`*`, `?`, `[...]`), as seen from `ckpt_dir`; only those are drawn.  None: all.
        columns: of a page that a figure is as wide as, 1 (3.3 inches) or 2 (6.9 inches).
        labels: what figures call data sets, networks, methods and runs, by the names that the records have.
        on_fault: called with each checkpoint that cannot be measured and why; None: raise.
        log: called with a line for each figure.

    Returns:
        A row a figure: figure (its key), title, path (of the .png, None if there was nothing to draw), note (the
        caption, or why there is no figure).

    Raises:
        UserError: for an unknown figure, or a folder without checkpoints (without records, if not to measure).
    """
    names = [figures] if isinstance(figures, str) else list(figures)
    everything = ALL in names
    for name in names:
        if name != ALL and name not in FIGURES:
            folder = " A folder of runs is given as --ckpt-dir FOLDER." if Path(name).is_dir() else ""
            known = f"Known: all, {', '.join(FIGURES)}."
            raise UserError(f"Unknown figure '{name}'{did_you_mean(name, FIGURES)}. {known}{folder}")
    root = Path(ckpt_dir)
    if not root.is_dir():
        raise UserError(f"No folder '{root}'. Give a run, or a folder of runs; 'fpq-analyze train' makes one.")
    report = on_fault or raise_fault
    patterns = ["*"] if runs is None else [runs] if isinstance(runs, str) else list(runs)
    if measure:
        source_of(ckpt_dir).find_runs(root)
    where = {"n_data": n_data, "seed": seed, "device": device, "data_root": data_root, "model": model}
    drawn = []
    frames: dict[tuple[str, bool], pd.DataFrame] = {}  # several figures may be of one measurement
    for name, drawing in FIGURES.items():
        if everything and name not in PAPER and rec.load(records or root, drawing.probe, report).empty:
            continue
        if everything or name in names:
            what = drawing.probe, drawing.picture.last
            if what not in frames:
                frames[what] = _measured(drawing, ckpt_dir, records, where if measure else None, report)
            with look(columns, labels):
                row = _draw(drawing, frames[what], Path(out), patterns)
            files = row["path"] and written([row["path"].with_suffix(suffix) for suffix in (".png", ".pdf", ".txt")])
            log(f"{drawing.title}: {files or row['note']}")
            drawn.append({"figure": name, "title": drawing.title, **row})
    return pd.DataFrame(drawn, columns=["figure", "title", "path", "note"])


def _draw(drawing: Drawing, frame: pd.DataFrame, out: Path, patterns: list[str]) -> dict[str, Any]:
    if frame.empty:
        return {"path": None, "note": f"not measured yet; 'fpq-analyze {drawing.command}' does"}
    faults: list[UserError] = []
    with going_on(faults.append, drawing.title):
        fits = [any(fnmatchcase(str(run), pattern) for pattern in patterns) for run in frame["run"]]
        if not any(fits):
            known = ", ".join(sorted(frame["run"].astype(str).unique())[:12])
            raise NothingToDraw(f"no run's name fits {' or '.join(map(repr, patterns))}; measured were {known}")
        frame = frame[fits]
        picture, *_ = drawing.write(frame, out)
        return {"path": picture, "note": drawing.caption(frame)}
    what = "nothing to draw" if isinstance(faults[0], NothingToDraw) else "not drawn"
    return {"path": None, "note": f"{what}: {faults[0]}"}


def _measured(
    drawing: Drawing,
    ckpt_dir: str | os.PathLike[str],
    records: str | os.PathLike[str] | None,
    where: dict[str, Any] | None,
    on_fault: Fault,
) -> pd.DataFrame:
    if where is not None:
        from fpq_analysis.pipeline.run import measure
        from fpq_analysis.probes import PROBES

        if drawing.probe in PROBES:
            epochs = "last" if drawing.picture.last else "all"
            probe = PROBES[drawing.probe]()
            frame = measure(ckpt_dir, probe, epochs=epochs, records=records, on_fault=on_fault, **where)
            if not frame.empty:
                return frame
    # Networks for which the default settings do not hold may have been measured with others.
    return rec.load(records or ckpt_dir, drawing.probe, on_fault)
