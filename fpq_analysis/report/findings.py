"""What the comparisons say, in plain sentences, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fpq_analysis.intervals import newcombe, over_seeds
from fpq_analysis.records.comparison import SeedsDifference
from fpq_analysis.report.comparisons import (
    Comparison,
    accuracy_pairs,
    against_float,
    against_method,
    among_own,
    variant,
)
from fpq_analysis.report.study import DEFINITIONS, Study
from fpq_analysis.runs import Run, number_of
from fpq_analysis.text import listed


@dataclass(frozen=True)
class Finding:
    """What was found on one subject, in sentences."""

    subject: str
    sentences: list[str]


def findings(study: Study) -> list[Finding]:
    """The study's results: curvature, accuracy, and what their number of seeds allows to say."""
    comparisons = [c for c in against_method(study) + among_own(study) if c.definition == study.definition]
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
        several = SeedsDifference.of([c.difference for c in group])
        sentences.append(several.sentence(_name(study, first.ours), _name(study, first.theirs)))
    return sentences


def _by_kind(comparisons: Iterable[Comparison]) -> list[list[Comparison]]:
    """Groups of comparisons that differ in nothing but the training seed, each seed once."""
    groups: dict[tuple[object, ...], dict[int | None, Comparison]] = {}
    for c in comparisons:
        alone = c.ours.name if c.ours.seed is None else ""
        groups.setdefault((c.ours.group, c.ours.kind, c.theirs.kind, alone), {})[c.ours.seed] = c
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
    return [f"Run against run on the same samples: {'; '.join(parts)}."] if len(parts) > 1 else []


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
