"""What the records say, as comparisons and in plain sentences, each with its interval."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from fpq_analysis import records
from fpq_analysis.intervals import newcombe, over_seeds
from fpq_analysis.methods import BASELINE, method_label
from fpq_analysis.records.comparison import Difference, against_baseline, difference
from fpq_analysis.records.queries import marked
from fpq_analysis.report.study import DEFINITIONS, Study, reading_order
from fpq_analysis.runs import PLACES, Run, number_of
from fpq_analysis.text import listed, number


@dataclass(frozen=True)
class Comparison:
    """The traces of two runs on the same images.

    Attributes:
        ours, theirs: the runs; the difference is ours minus theirs.
        definition: of the Hessian.
        difference: at `difference.epoch` of ours.
        theirs_epoch: the epoch of theirs.
    """

    ours: Run
    theirs: Run
    definition: str
    difference: Difference
    theirs_epoch: int

    @property
    def sign(self) -> int:
        """-1, 1, or 0 where the 95 % interval holds zero."""
        value, half = self.difference.value, self.difference.ci95
        return 0 if abs(value) <= half else int(math.copysign(1, value))

    @property
    def verdict(self) -> str:
        """The sign in words."""
        return {-1: "lower", 0: "not measurably different", 1: "higher"}[self.sign]


@dataclass(frozen=True)
class Finding:
    """What was found on one subject, in sentences."""

    subject: str
    sentences: list[str]


def variant(study: Study, run: Run) -> str:
    """The method's name, with the settings that tell it from the study's other runs of the method."""
    alike = [r for r in study.runs if (r.method, r.model, r.dataset) == (run.method, run.model, run.dataset)]
    keys = [key for key in varying(alike) if key not in ("seed", "bits")]
    extra = ", ".join(f"{key} {run.config.get(key)}" for key in keys)
    return method_label(run.method) + (f" ({extra})" if extra else "")


def varying(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all of the runs, but for places on disk."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [
        key
        for key in keys
        if key not in PLACES and len({json.dumps(run.config.get(key), sort_keys=True) for run in runs}) > 1
    ]


def against_method(study: Study) -> list[Comparison]:
    """Every quantized run against the LSQ run beside it, see `comparison.against_baseline`; under every definition."""
    found = []
    for definition, rows in study.traces.groupby("definition", sort=False):
        for gap in against_baseline(rows, BASELINE):
            ours, theirs = study.run(gap.run), study.run(gap.baseline)
            if ours is not None and theirs is not None:
                found.append(Comparison(ours, theirs, str(definition), gap, gap.epoch))
    return sorted(found, key=lambda c: reading_order(c.ours))


def against_float(study: Study) -> list[Comparison]:
    """Every quantized run's last trace against that of the float checkpoint it started from, on the same images."""
    found = []
    for definition, rows in study.traces.groupby("definition", sort=False):
        rows = rows[rows["samples"].notna()]
        for run in study.runs:
            ours = rows[rows["run"] == run.name].sort_values("epoch", kind="stable")
            if run.bits == "FP" or run.teacher_sha256 is None or ours.empty:
                continue
            last = ours.iloc[-1]
            same = ["data", "n_data", "seed", "estimator"]
            theirs = rows[(rows["checkpoint"] == run.teacher_sha256) & (rows[same] == last[same]).all(axis=1)]
            start = study.run(str(theirs["run"].iloc[0])) if len(theirs) else None
            if start is not None:
                gap = difference(last, theirs.iloc[0])
                found.append(Comparison(run, start, str(definition), gap, int(theirs["epoch"].iloc[0])))
    return found


def accuracy_pairs(study: Study) -> list[tuple[Run, Run]]:
    """Every finished quantized run with the finished LSQ run of its folder, network, data, bits and seed."""
    found = []
    done = [run for run in study.runs if run.finished and run.bits != "FP" and run.last_accuracy is not None]
    for run in done:
        alike = [r for r in done if (r.group, r.bits, r.seed) == (run.group, run.bits, run.seed)]
        theirs = [r for r in alike if r.method == BASELINE]
        if run.method != BASELINE and len(theirs) == 1:
            found.append((run, theirs[0]))
    return found


def findings(study: Study) -> list[Finding]:
    """The study's results: curvature, accuracy, and what their number of seeds allows to say."""
    comparisons = [c for c in against_method(study) if c.definition == study.definition]
    found = [
        Finding("Curvature", [*_traces(study, comparisons), *_definitions(study), *_float(study)]),
        Finding("Accuracy", _accuracies(study)),
        Finding("How far this goes", _seeds(study, len(_by_kind(comparisons)))),
    ]
    return [finding for finding in found if finding.sentences]


def _traces(study: Study, comparisons: list[Comparison]) -> list[str]:
    sentences = []
    for group in _by_kind(comparisons):
        first = group[0]
        if len(group) == 1:
            sentences.append(first.difference.sentence())
            continue
        mean, half = over_seeds([c.difference.value for c in group])
        base = statistics.mean(c.difference.baseline_value for c in group)
        what = _change(mean, half, "", number)
        sentences.append(
            f"{_name(study, first.ours)} against {_name(study, first.theirs)}, over {len(group)} training seeds: the "
            f"trace {what} on average ({100 * abs(mean / base):.0f} % of {number(base, 3)}; 95 % Student interval over "
            "the seeds)."
        )
    return sentences


def _by_kind(comparisons: Iterable[Comparison]) -> list[list[Comparison]]:
    """Groups of comparisons that differ in nothing but the training seed, each seed once."""
    groups: dict[tuple[object, ...], dict[int | None, Comparison]] = {}
    for c in comparisons:
        groups.setdefault((c.ours.group, c.ours.kind, c.theirs.kind), {})[c.ours.seed] = c
    return [list(group.values()) for group in groups.values()]


def _name(study: Study, run: Run) -> str:
    return f"{variant(study, run)} {run.bits}"


def _change(mean: float, half: float, unit: str, form: Callable[[float, int], str]) -> str:
    if abs(mean) <= half:
        return f"does not differ measurably: {'+' if mean > 0 else ''}{form(mean, 3)} ± {form(half, 2)}{unit}"
    return f"is {'lower' if mean < 0 else 'higher'} by {form(abs(mean), 3)} ± {form(half, 2)}{unit}"


def _definitions(study: Study) -> list[str]:
    """How the runs compare under each definition, where there are several."""
    every = against_method(study)
    counts = [(name, [c.sign for c in every if c.definition == name]) for name in DEFINITIONS]
    parts = [
        f"{signs.count(-1)} lower, {signs.count(1)} higher and {signs.count(0)} not measurably different under '{name}'"
        for name, signs in counts
        if signs
    ]
    return [f"Run against run on the same images: {'; '.join(parts)}."] if len(parts) > 1 else []


def _float(study: Study) -> list[str]:
    signs = [c.sign for c in against_float(study) if c.definition == study.definition]
    words = {1: "higher than", -1: "lower than", 0: "not measurably different from"}
    counts = [f"{signs.count(sign)} {text}" for sign, text in words.items() if sign in signs]
    if not counts:
        return []
    many = f"{len(signs)} quantized networks" if len(signs) > 1 else "one quantized network"
    return [f"Last traces of {many}: {listed(counts)} that of the float network they started from."]


def _accuracies(study: Study) -> list[str]:
    groups: dict[tuple[object, ...], dict[int | None, tuple[Run, Run]]] = {}
    for ours, theirs in accuracy_pairs(study):
        groups.setdefault((ours.group, ours.kind, theirs.kind), {})[ours.seed] = ours, theirs
    sentences, tested = [], set()
    for group in (list(by_seed.values()) for by_seed in groups.values()):
        a, b = group[0]
        if len(group) > 1:
            gaps = [100 * (x.last_accuracy - y.last_accuracy) for x, y in group]  # type: ignore[operator]
            mean, half = over_seeds(gaps)
            what = _change(mean, half, " points", lambda x, _: f"{x:.2f}")
            sentences.append(
                f"{_name(study, a)} against {_name(study, b)}, over {len(group)} training seeds: test accuracy {what} "
                "on average (95 % Student interval over the seeds)."
            )
            continue
        p, q, n = a.last_accuracy, b.last_accuracy, number_of(a.data, "n_test")
        if p is None or q is None or not n:
            continue
        low, high = newcombe(p, q, int(n))
        tested.add(int(n))
        both = f"{100 * p:.2f} % against {100 * q:.2f} %"
        interval = f"95 % interval of the difference {signed(100 * low)} to {signed(100 * high)} points"
        if low <= 0 <= high:
            sentences.append(f"{a.name} and {b.name} do not differ measurably in test accuracy: {both} ({interval}).")
        else:
            word = "more" if p > q else "less"
            sentences.append(
                f"{a.name} is {100 * abs(p - q):.2f} points {word} accurate than {b.name}: {both} ({interval})."
            )
    if tested:
        count = " or ".join(f"{n:,}" for n in sorted(tested))
        sentences.append(
            f"These intervals are over the {count} test images, with the two networks' errors taken as independent, "
            "which is too wide where both err on the same images."
        )
    return sentences


def signed(value: float) -> str:
    """With its sign, to one decimal."""
    return f"{value:+.1f}".replace("-", "−")


def _seeds(study: Study, n_comparisons: int) -> list[str]:
    counts = sorted({len(group) for group in _seed_groups(study)})
    if not counts:
        return []
    if counts[-1] == 1:
        sentence = (
            "There is one training run of each kind. The intervals hold for these trained networks; how the methods "
            "differ from each other, rather than these runs of them, needs several training seeds."
        )
    else:
        several = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        sentence = f"Each kind of run was trained with {several} seeds; intervals over seeds speak of the methods."
    sentences = [sentence]
    if n_comparisons >= 5:
        sentences.append(
            f"With {n_comparisons} comparisons, each at 95 %, about one in twenty would show a difference by chance."
        )
    return sentences


def _seed_groups(study: Study) -> list[set[int | None]]:
    groups: dict[tuple[object, ...], set[int | None]] = {}
    for run in study.runs:
        if run.finished:
            groups.setdefault((run.group, run.kind), set()).add(run.seed)
    return list(groups.values())


def cautions(study: Study) -> list[str]:
    """What a reader should know before trusting the page: damage, unfinished runs, stale or odd records."""
    notes = list(study.faults)
    for run in study.runs:
        if run.stopped:
            notes.append(f"{run.name} is not finished: {run.last_epoch or 0} of {run.config.get('epochs')} epochs.")
    for run in study.runs:
        last = study.last_trace(run)
        if last is not None and run.last_epoch is not None and last["epoch"] < run.last_epoch:
            notes.append(
                f"{run.name}: the trace was measured up to epoch {last['epoch']}, training went to {run.last_epoch}."
            )
    folders = {run.name: run for run in study.runs}
    for probe in study.probes:
        frame = study.records(probe)
        for status, rows in marked(frame).groupby("status"):
            notes.append(f"{probe}: {len(rows)} numbers are marked '{status}'.")
        gone = sum(_is_gone(row, folders) for _, row in frame.drop_duplicates(["run", "checkpoint"]).iterrows())
        if gone:
            notes.append(
                f"{probe}: {gone} measurements are of checkpoints that are no longer there (by their SHA-256). Were "
                "the runs trained anew? Then measure them again."
            )
        every = records.read(study.kept, [study.kept / name for name in folders], probe)
        hidden = every["settings"].nunique() - frame["settings"].nunique()
        if hidden > 0:
            notes.append(
                f"{probe}: the records also hold measurements with other settings (images, seed or method), which are "
                "not shown here."
            )
    return notes


def _is_gone(row: pd.Series, runs: dict[str, Run]) -> bool:
    run = runs.get(str(row["run"]))
    return run is not None and bool(run.manifest) and row["checkpoint"] not in run.manifest.values()
