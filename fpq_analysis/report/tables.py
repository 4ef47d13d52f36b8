"""The tables of results: runs, accuracies, differences, and what every other probe measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from fpq_analysis.methods import BASELINE, method_label
from fpq_analysis.records.queries import half_widths, samples_of
from fpq_analysis.report.cells import (
    NONE,
    SHORT_HASH,
    Cell,
    Interval,
    Table,
    digits_beside,
    num,
    percent,
    run_cell,
    shown,
)
from fpq_analysis.report.comparisons import Comparison, against_float, against_method, among_own, variant
from fpq_analysis.report.headings import (
    NOT_RESULTS,
    heading,
    is_share,
    order,
    place,
    place_heading,
    place_order,
    title,
)
from fpq_analysis.report.study import Study
from fpq_analysis.runs import Run
from fpq_analysis.text import duration

MOST_QUANTITIES = 16  # of a probe with more, a table would be no help


def runs_table(study: Study) -> Table:
    """A row a run: what it is, how it ended, and its last trace."""
    several = len({run.dataset for run in study.runs}) > 1
    heads = ["Run", "Method", "Network", *(["Data"] if several else []), "Bits", "Seed", "Epochs"]
    heads += ["Accuracy", "Best", "Clipped"]
    definition = study.definition
    heads += ["Trace", "± 95 %"] if definition else []
    heads += ["Checkpoint", "Training"]
    rows = []
    for run in study.runs:
        row = [run_cell(study, run), Cell(method_label(run.method)), Cell(run.model)]
        row += [Cell(run.dataset)] if several else []
        unknown = run.method == "quantized" and run.bits == "FP"  # by code that says nothing of bits
        row += [Cell(NONE if unknown else run.bits), num(run.seed, text=str(run.seed))]
        row += [num(run.last_epoch, text=str(run.last_epoch))]
        row += [percent(run.last_accuracy), percent(run.best_accuracy), percent(run.clipped, 1)]
        if definition:
            last = study.last_trace(run)
            if last is None:
                row += [num(None), num(None)]
            else:
                row += [num(last["value"], digits_beside(last["value"], last["ci95"])), num(last["ci95"], 2)]
        row += [Cell((run.newest_sha256 or NONE)[:SHORT_HASH], code=run.newest_sha256 is not None)]
        row += [num(run.seconds, text=None if run.seconds is None else duration(run.seconds))]
        rows.append(row)
    notes = [
        "Accuracy: on the test images after the last epoch, in %. That of the best epoch is chosen on the same images, "
        "so it is too high.",
        "Clipped: share of the weights outside their quantizer's grid after the last epoch, in %.",
    ]
    if definition:
        what = f"Trace: of the Hessian (definition: {definition}) at the last epoch measured"
        notes.append(f"{what}; {interval_of(study.traces)}.")
    notes.append("Checkpoint: first digits of the last one's SHA-256. Training: time of the training steps.")
    return Table("Runs", heads, rows, notes)


def interval_of(rows: pd.DataFrame) -> str:
    """What ± stands for in these records."""
    if rows["sem_data"].isna().all():
        return "the interval is over the random probes, for these samples"
    if rows["sem_data"].isna().any():
        return "the interval is over the samples, or, where single samples are not seen, over the random probes"
    return "the interval is over the samples measured on, not over training runs"


def accuracy_table(study: Study) -> Table | None:
    """Test accuracy after the last epoch by method and bits, over the seeds; finished runs alone."""
    runs = [run for run in study.runs if run.finished and run.last_accuracy is not None]
    if not runs:
        return None
    widths = list(dict.fromkeys(run.bits for run in runs))
    places = list(dict.fromkeys((run.dataset, run.model) for run in runs))
    cells: dict[tuple[Any, ...], dict[str, dict[Any, Run]]] = {}
    for run in runs:
        of_row = cells.setdefault((run.dataset, run.model, variant(study, run)), {})
        of_row.setdefault(run.bits, {})[run.seed] = run  # a seed that is there twice counts once
    several = len(places) > 1
    heads = [*(["Data", "Network"] if several else []), "Method", *widths]
    rows = []
    for (data, model, name), by_bits in sorted(cells.items(), key=lambda item: places.index(item[0][:2])):
        first = next(iter(next(iter(by_bits.values())).values()))
        label = Cell(name, colour=run_cell(study, first).colour)
        row = [*([Cell(data), Cell(model)] if several else []), label]
        rows.append([*row, *(_accuracy(list(by_bits.get(bits, {}).values())) for bits in widths)])
    notes = [f"Test accuracy after the last epoch, in %{_places(places)}."]
    if any(len(seeds) > 1 for by_bits in cells.values() for seeds in by_bits.values()):
        notes.append("±: standard deviation over training seeds, their number in brackets.")
    if any(len(seeds) == 1 for by_bits in cells.values() for seeds in by_bits.values()):
        notes.append("A number without ± is of a single training run.")
    return Table("Test accuracy", heads, rows, notes)


def _places(places: Sequence[tuple[str, str]]) -> str:
    return f"; {places[0][1]} on {places[0][0]}" if len(places) == 1 else ""


def _accuracy(runs: list[Run]) -> Cell:
    found = [run.last_accuracy for run in runs if run.last_accuracy is not None]
    if len(found) < 2:
        return percent(found[0] if found else None)
    mean, sd = statistics.mean(found), statistics.stdev(found)
    return num(mean, text=f"{100 * mean:.2f} ± {100 * sd:.2f} ({len(found)})")


def comparison_tables(study: Study) -> list[Table]:
    """Differences of traces on the same samples: against LSQ, among another program's runs, against the float start."""
    against = {
        f"Against {method_label(BASELINE)}": (against_method(study), "at the last epoch that both have"),
        "Among each other": (among_own(study), "at the last epoch that both have"),
        "Against the float network": (
            [c for c in against_float(study) if c.definition == study.definition],
            "the run's at its last epoch, the float network's at the checkpoint that the run started from",
        ),
    }
    return [_comparisons(study, name, found, when) for name, (found, when) in against.items() if found]


def _comparisons(study: Study, name: str, found: list[Comparison], when: str) -> Table:
    several = len({c.definition for c in found}) > 1
    relative = [(abs(c.difference.value) + c.difference.ci95) / abs(c.difference.baseline_value) for c in found]
    reach = min(max(relative), 2.0)  # one difference of a thousand per cent must not flatten all others
    heads = [
        "Run",
        "Minus",
        *(["Definition"] if several else []),
        "Its trace",
        "Difference",
        "± 95 %",
        "In %",
        "Drawn",
        "Verdict",
    ]
    rows = [_compared(study, c, several, reach) for c in found]
    what = "" if several else f" (definition: {found[0].definition})"
    notes = [
        f"The run's trace minus the other's{what}, sample by sample on the same samples; {when}.",
        f"In % and the bars: relative to the other's trace; bars from −{100 * reach:.0f} to +{100 * reach:.0f} %, no "
        "difference in the middle.",
        "Intervals are over the samples. They hold for these trained networks, not for the methods.",
    ]
    return Table(name, heads, rows, notes)


def _compared(study: Study, c: Comparison, several: bool, reach: float) -> list[Cell]:
    gap = c.difference
    base = abs(gap.baseline_value)
    ends = (gap.value - gap.ci95, gap.value, gap.value + gap.ci95)
    low, value, high = (50 + 50 * max(-1.0, min(1.0, end / base / reach)) for end in ends)
    sign = {-1: "▼ lower", 0: "≈ no measurable difference", 1: "▲ higher"}[c.sign]
    theirs = c.theirs.name if c.theirs_epoch == gap.epoch else f"{c.theirs.name}, epoch {c.theirs_epoch}"
    return [
        run_cell(study, c.ours),
        Cell(theirs, colour=run_cell(study, c.theirs).colour),
        *([Cell(c.definition)] if several else []),
        num(gap.baseline_value),
        num(gap.value, digits_beside(gap.value, gap.ci95)),
        num(gap.ci95, 2),
        num(gap.value / base, text=f"{100 * gap.value / base:+.0f}".replace("-", "−")),
        Cell("", interval=Interval(low, value, high)),
        Cell(sign),
    ]


def number_tables(study: Study) -> list[Table]:
    """Of every other probe, the whole-network quantities at each run's last measured epoch."""
    found = []
    for probe in study.probes:
        frame = study.records(probe)
        if probe == "hessian_trace":
            continue
        rows = frame[(frame["layer"] == "all") & frame["value"].notna()]
        rows = rows[~rows["quantity"].str.fullmatch(NOT_RESULTS)]
        if rows.empty:
            continue
        parts = rows["quantity"].str.partition("@")  # of the name: quantity, @, what it was measured at
        rows = rows.assign(quantity=parts[0], at=parts[2])
        quantities = sorted(rows["quantity"].unique(), key=order)
        if 0 < len(quantities) <= MOST_QUANTITIES:
            found.append(_numbers(study, probe, rows, quantities))
    return found


def _numbers(study: Study, probe: str, rows: pd.DataFrame, quantities: list[str]) -> Table:
    several, places = rows["definition"].nunique() > 1, (rows["at"] != "").any()
    heads = ["Run", *(["Definition"] if several else []), "Epoch", *([place_heading(probe)] if places else [])]
    cells, errors = [], False
    for run in study.runs:
        for definition, own in rows[rows["run"] == run.name].groupby("definition", dropna=False, sort=False):
            last = own[own["epoch"] == own["epoch"].max()]
            epoch = int(last["epoch"].iloc[0])
            about = [run_cell(study, run), *([Cell(str(definition))] if several else []), num(epoch, text=str(epoch))]
            for at in sorted(last["at"].unique(), key=partial(place_order, probe)):
                by_name = last[last["at"] == at].drop_duplicates("quantity", keep="last").set_index("quantity")
                halves = half_widths(by_name)
                errors = errors or bool((halves > 0).any())
                numbers = [
                    _with_error(float(by_name.loc[name, "value"]), float(halves[name]), is_share(probe, name))
                    if name in by_name.index
                    else num(None)
                    for name in quantities
                ]
                cells.append([*about, *([Cell(place(probe, at))] if places else []), *numbers])
    n = ", ".join(f"{int(x):,}" for x in sorted(rows["n_data"].dropna().unique()) if x)
    notes = ["At each run's last measured epoch" + (f", on {n} {samples_of(rows)}." if n else ".")]
    if errors:
        notes.append("±: half of the 95 % interval that the record states, or 1.96 times its standard error.")
    return Table(title(probe), [*heads, *(heading(probe, name) for name in quantities)], cells, notes)


def _with_error(value: float, half: float, share: bool) -> Cell:
    scale = 100 if share else 1
    text = shown(scale * value, digits_beside(value, half)) + (f" ± {shown(scale * half, 2)}" if half > 0 else "")
    return num(value, text=text)
