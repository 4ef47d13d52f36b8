"""The page: everything of a study, through the template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from fpq_analysis import __version__
from fpq_analysis.errors import UserError
from fpq_analysis.files import write_text
from fpq_analysis.methods import method_label
from fpq_analysis.plots import FIGURES
from fpq_analysis.plots.names import title
from fpq_analysis.records.queries import samples_of
from fpq_analysis.report import provenance, tables
from fpq_analysis.report.cautions import cautions
from fpq_analysis.report.citations import bibtex
from fpq_analysis.report.findings import findings
from fpq_analysis.report.missing import not_measured
from fpq_analysis.report.pictures import Picture, pictures, side_by_side, training_pictures
from fpq_analysis.report.prose import DEFINITIONS, methods
from fpq_analysis.report.study import Study, read_study, seeds_in_words
from fpq_analysis.runs import Run
from fpq_analysis.text import listed

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        path: the page.
        runs: number of runs in it.
        figures: titles of its figures.
        missing: what has not been measured, with commas, and the command that does.
        cautions: what a reader is warned of.
    """

    path: Path
    runs: int
    figures: list[str]
    missing: list[tuple[str, str]]
    cautions: list[str]


def write_report(
    ckpt_dir: str | Path, path: str | Path = "report.html", *, records: str | Path | None = None
) -> Report:
    """Write one self-contained HTML page about every run at or below `ckpt_dir`.

    Nothing is measured and no checkpoint is opened: the page says what `run.json`, `train.jsonl` and the records say,
    and names what has not been measured.  It loads nothing from anywhere and runs no script.  Equal files give an
    equal page.

    Args:
        path: of the page; an existing one is replaced in one step.
        records: where the measurements are kept, if not in the runs; see `measure`.

    Raises:
        UserError: if there is no run, or the page's folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"No folder '{path.parent}' to write '{path.name}' into. Make it, or choose another -o.")
    if path.is_dir():
        raise UserError(f"'{path}' is a folder. Name the page in it: -o {path / 'report.html'}.")
    study = read_study(ckpt_dir, records)
    drawn, undrawn = pictures(study)
    training = training_pictures(study)
    lead, others = _lead(drawn, training)
    missing = not_measured(study, undrawn)
    notes = cautions(study)
    differing, shared = provenance.settings_table(study)
    accuracy = tables.accuracy_table(study)
    definitions = [(name, text, name in set(study.traces["definition"])) for name, text in DEFINITIONS.items()]
    page = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            css=Markup((HERE / "page.css").read_text()),
            title=_title(study),
            facts=_facts(study),
            findings=findings(study),
            cautions=notes,
            runs=tables.runs_table(study),
            accuracy=accuracy,
            comparisons=tables.comparison_tables(study),
            lead=lead,
            training=side_by_side([one for one in training if one is not lead]),
            pictures=side_by_side(others),
            numbers=tables.number_tables(study),
            missing=missing,
            loss=study.loss,
            definitions=[one for one in definitions if one[2] or study.quantized],
            quantized=study.quantized,
            methods=methods(study),
            differing=differing,
            shared=shared,
            versions=provenance.versions_table(study),
            provenance=provenance.provenance_tables(study),
            bibtex=bibtex(run.method for run in study.runs),
            version=__version__,
        )
    )
    write_text(path, page)
    return Report(path, len(study.runs), [picture.title for picture in drawn], missing.by_command, notes)


def _lead(drawn: list[Picture], training: list[Picture]) -> tuple[Picture | None, list[Picture]]:
    """The figure that the page begins with, and the other figures of measurements: the paper's main one, if drawn."""
    lead = next((one for one in drawn if one.title == FIGURES["5"].title), next(iter([*training, *drawn]), None))
    return lead, [one for one in drawn if one is not lead]


def _environment() -> jinja2.Environment:
    # Everything that comes from files is escaped; only this room's own style sheet and SVG are `Markup`.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = typeset
    return environment


def typeset(text: str) -> str:
    """Keep a number and its signs on one line, and write minus as U+2212."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", text)
    return re.sub(r"(?<=\d) (?=%)| (?=±)|(?<=±) ", "\u00a0", text)


def _title(study: Study) -> str:
    networks = _few([title(run.model) for run in study.runs], "networks")
    data = _few([title(run.dataset) for run in study.runs], "data sets")
    return f"{networks} on {data}: {listed(method_label(run.method) for run in study.runs)}"


def _few(names: list[str], what: str) -> str:
    """The names, or where there are many, how many."""
    different = set(names)
    return listed(names) if len(different) <= 4 else f"{len(different)} {what}"


def _facts(study: Study) -> list[tuple[str, str]]:
    """What was studied, when, on what: the head of the page."""
    bits = listed(run.bits for run in study.runs if run.bits != "FP")
    count = f"{len(study.runs)} run{'s' if len(study.runs) > 1 else ''}"
    traces = study.traces
    if traces.empty:
        measured = "no trace yet"
    else:
        n = ", ".join(f"{int(x):,}" for x in sorted(traces["n_data"].unique()))
        measured = f"{traces['checkpoint'].nunique():,} checkpoints on {n} {samples_of(traces)}"
    return [
        ("Runs", f"{count}; {bits}" if bits else count),
        ("Data", listed(map(_data, {run.dataset: run for run in study.runs}.values()))),
        ("Trained", _dates(study)),
        ("Training seeds", seeds_in_words(study.runs)),
        ("Hessian trace", measured),
    ]


def _data(run: Run) -> str:
    data = run.data
    counts = [f"{data[key]:,} {what}" for key, what in (("n_train", "training"), ("n_test", "test")) if key in data]
    return f"{title(run.dataset)} ({', '.join(counts)} images)" if counts else title(run.dataset)


def _dates(study: Study) -> str:
    days = []
    for run in study.runs:
        try:
            days.append(datetime.fromisoformat(run.started).date())
        except ValueError:
            continue
    if not days:
        return "unknown"
    first, last = min(days), max(days)
    text = f"{first.day} {first:%B %Y}"
    return text if first == last else f"{text} to {last.day} {last:%B %Y}"
