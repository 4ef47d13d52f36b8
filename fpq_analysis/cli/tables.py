"""`fpq-analyze tables`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.cli.app import Json, app, echo, fail_all, guarded, new_table, print_json, print_table
from fpq_analysis.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

# Networks side by side: as many as 80 columns hold.
ABREAST = 4
SHORT = {"resnet": "Res", "mobilenet_v": "MBV"}


@app.command()
@guarded
def tables(
    ckpt_dir: Annotated[Path, typer.Option(help="A folder of runs.")] = Path("checkpoints"),
    table: Annotated[int | None, typer.Option(help="One of the five. Default: all that have a measured cell.")] = None,
    data: Annotated[str | None, typer.Option(help="Take the runs on this data set for the paper's.")] = None,
    json: Json = False,
) -> None:
    """Tables 1-5 of the paper: its accuracies beside what was measured, blank where nothing was run.

    Measured is the test accuracy after the last epoch, mean ± standard deviation over seeds. Networks that the paper
    does not have stand behind its own. A row of FPQ takes runs with that row's sfp_p (0.1 unless named) and csd_weight
    (1 unless off), no others.

    [bold]Examples[/bold]

      fpq-analyze tables --ckpt-dir checkpoints/paper

      fpq-analyze tables --ckpt-dir checkpoints/small --data digits --table 2
    """
    from fpq_analysis.report.paper import PAPER, paper_tables

    if table is not None and table not in PAPER:
        raise UserError(f"There is no Table {table}; the paper has Tables {min(PAPER)} to {max(PAPER)}.")
    faults: dict[Path, UserError] = {}
    frame = paper_tables(ckpt_dir, data=data, on_fault=faults.__setitem__)
    _print(frame, table, json)
    fail_all(faults)


def _print(frame: pd.DataFrame, table: int | None, json: bool) -> None:
    from fpq_analysis.report.paper import PAPER

    measured = set(frame.loc[frame["n"] > 0, "table"])
    numbers = [table] if table is not None else [number for number in PAPER if number in measured] or list(PAPER)
    frame = frame[frame["table"].isin(numbers)]
    if json:
        print_json(frame)
        return
    for number in numbers:
        echo(f"Table {number}: {PAPER[number].title}, {PAPER[number].data}, accuracy in %")
        _print_one(frame[frame["table"] == number])
    _print_notes(frame, {number: PAPER[number].data for number in numbers})


def _print_one(cells: pd.DataFrame) -> None:
    models = list(dict.fromkeys(cells["model"]))
    for start in range(0, len(models), ABREAST):
        block = models[start : start + ABREAST]
        heads = {"Row": "left", "W/A": "left"}
        for model in block:
            heads |= {_short(model): "right", " " * len(heads) + "ours": "right"}
        table = new_table(heads)
        table.padding = (0, 1, 0, 0)
        bits = None
        for (row, width), of_row in cells.astype({"bits": str}).groupby(["row", "bits"], sort=False):
            width = str(width)
            if bits is not None and width != bits:
                table.add_row()
            bits = width
            by_model = of_row.set_index("model")
            numbers = []
            for model in block:
                cell = by_model.loc[model]
                numbers += [_number(cell["paper"]), _ours(cell["mean"], cell["sd"])]
            table.add_row(str(row), "" if width == "FP" else f"{width[1]}/{width[3]}", *numbers)
        print_table(table)
        echo()


def _short(model: str) -> str:
    for long, short in SHORT.items():
        if model.startswith(long):
            return model.replace(long, short)
    return model.rpartition(":")[2]


def _number(value: float) -> str:
    return f"{value:.2f}" if value == value else ""


def _ours(mean: float, sd: float) -> str:
    return _number(mean) + (f"±{sd:.2f}" if sd == sd else "")


def _print_notes(cells: pd.DataFrame, paper_data: dict[int, str]) -> None:
    measured = cells[cells["n"] > 0]
    notes = ["Under a network's name the paper's number; ours: test accuracy after the last epoch"]
    if len(measured):
        seeds = " to ".join(str(n) for n in dict.fromkeys((measured["n"].min(), measured["n"].max())))
        notes[0] += f", mean ± standard deviation over seeds ({seeds} a cell)"
    other = measured["data"].ne(measured["table"].map(paper_data))
    if other.any():
        which = ", ".join(str(number) for number in dict.fromkeys(measured.loc[other, "table"]))
        notes.append(
            f"Ours in Table {which}: trained on {measured.loc[other, 'data'].iloc[0]}, not on the paper's data"
        )
    epochs = sorted({int(e) for e in cells["epochs"].dropna()})
    if epochs:
        notes.append(f"Epochs of ours: {', '.join(map(str, epochs))} (the paper: 200)")
    unique = cells.drop_duplicates(["row", "bits", "data", "model"])
    for column, text in (
        ("left_out", "finished runs are left out, for settings other than those of the runs shown"),
        ("unfinished", "runs are not finished, and not in the means"),
    ):
        if unique[column].sum():
            notes.append(f"{int(unique[column].sum())} {text}")
    echo("\n".join(textwrap.fill(f"{note}.", width=80) for note in notes))
