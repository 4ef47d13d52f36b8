"""The tables of where results come from: settings, data, files, records and versions, by their hashes."""

from __future__ import annotations

from typing import Any

from fpq_analysis.report.cells import NONE, SHORT_HASH, Cell, Table, num, plain, run_cell
from fpq_analysis.report.comparisons import varying
from fpq_analysis.report.study import Study
from fpq_analysis.runs import PLACES, Run, number_of
from fpq_analysis.text import duration


def settings_table(study: Study) -> tuple[Table | None, list[tuple[str, str]]]:
    """The settings in which the runs differ, a row a run; and those that all share."""
    keys = varying(study.runs)
    shared = [
        (key, plain(value)) for key, value in study.runs[0].config.items() if key not in keys and _is_setting(key)
    ]
    if not keys:
        return None, shared
    rows = [
        [run_cell(study, run), *(_setting(run.config.get(key)) for key in keys), Cell(_start(study, run))]
        for run in study.runs
    ]
    return Table("Settings that differ", ["Run", *keys, "started from"], rows), shared


def _is_setting(key: str) -> bool:
    return key not in PLACES


def _setting(value: Any) -> Cell:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(plain(value), float(value) if is_number else None, number=is_number)


def _start(study: Study, run: Run) -> str:
    """Which checkpoint a run started from."""
    if run.teacher_sha256 is None:
        return NONE
    for other in study.runs:
        for name, digest in other.manifest.items():
            if digest == run.teacher_sha256:
                return f"{other.name}, {name.removesuffix('.pt')}"
    return f"{str(run.teacher_sha256)[:SHORT_HASH]}… (not here)"


def provenance_tables(study: Study) -> list[Table]:
    """Data, files and records, by their hashes."""
    data = {(run.dataset, str(run.data.get("fingerprint", NONE))): run.data for run in study.runs}
    sets = [
        [Cell(name), _count(about, "n_train"), _count(about, "n_test"), Cell(fingerprint, code=True)]
        for (name, fingerprint), about in data.items()
    ]
    runs = [
        [
            run_cell(study, run),
            Cell(run.started.replace("T", " ")[:16] or NONE),
            Cell(run.newest_sha256 or NONE, code=True),
        ]
        for run in study.runs
    ]
    measured = []
    for probe in study.probes:
        for (definition, digest), rows in study.records(probe).groupby(["definition", "settings"], dropna=False):
            once = rows.drop_duplicates(["run", "key"])
            measured.append(
                [
                    Cell(probe),
                    Cell(_or_none(definition)),
                    Cell(", ".join(sorted(rows["estimator"].dropna().unique())) or NONE),
                    num(len(once), text=str(len(once))),
                    Cell(", ".join(f"{int(n):,}" for n in sorted(rows["n_data"].dropna().unique())), number=True),
                    Cell(", ".join(map(str, sorted(rows["seed"].dropna().unique()))), number=True),
                    Cell(str(digest), code=True),
                    num(once["seconds"].sum(), text=duration(float(once["seconds"].sum()))),
                ]
            )
    tables = [
        Table(
            "Data",
            ["Data", "Training", "Test", "Fingerprint"],
            sets,
            ["The fingerprint is the same only if every sample is."],
        ),
        Table("Checkpoints", ["Run", "Started (UTC)", "SHA-256 of the last checkpoint"], runs),
    ]
    if measured:
        heads = ["Measurement", "Definition", "Estimator", "Checkpoints", "Images", "Seed", "Settings", "Time"]
        note = (
            "Settings: hash of the measurement, its version and options, samples and seed; equal hashes are comparable."
        )
        tables.append(Table("Records", heads, measured, [note]))
    return tables


def _or_none(value: Any) -> str:
    return NONE if value is None or value != value else str(value)


def _count(about: dict[str, Any], key: str) -> Cell:
    value = number_of(about, key)
    return num(value, text=None if value is None else f"{int(value):,}")


def versions_table(study: Study) -> Table | None:
    """Software by version, of the training runs."""
    names = list(dict.fromkeys(name for run in study.runs for name in run.versions))
    if not names:
        return None
    rows = [
        [Cell(name), Cell(", ".join(sorted({run.versions[name] for run in study.runs if name in run.versions})))]
        for name in names
    ]
    note = "As written when the runs were trained; records do not hold the versions they were measured with."
    return Table("Versions", ["Software", "Version"], rows, [note])
