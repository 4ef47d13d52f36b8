"""`fpq-analyze gradnorm`, `features`, ...: a command for each row of `measures.py` that has a help text for one."""

from __future__ import annotations

import inspect
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

from fpq_analysis.cli.app import echo
from fpq_analysis.cli.measuring import Settings, check_runs, measure_and_show, measuring_command, print_quantities
from fpq_analysis.cli.options import numbers, options_of
from fpq_analysis.measures import MEASURES, Measure
from fpq_analysis.methods import load_class

if TYPE_CHECKING:
    import pandas as pd


def _register(name: str, row: Measure) -> None:
    def command(settings: Settings, **options: Any) -> None:
        given = {key: numbers(key, x) if isinstance(x, list) else x for key, x in options.items()}
        row.settings(**given)  # refuses what makes no sense, before torch is loaded
        check_runs(settings)
        from fpq_analysis.probes import PROBES

        probe = PROBES[name](**given)
        measure_and_show([probe], settings, {name: partial(_show, row)})

    command.__name__ = row.command
    command.__doc__ = f"{inspect.cleandoc(row.help)}\n\nMore: docs/{row.page}.md"
    measuring_command(row.fixed, **row.shared)(options_of(row.settings)(command))


def _show(row: Measure, frame: pd.DataFrame) -> None:
    if row.show:
        load_class(f"fpq_analysis.cli.shown:{row.show}")(frame)
    elif not frame.empty:
        found = frame.loc[frame["layer"] == "all", "quantity"].unique()
        print_quantities(frame, row.headings or {name: name.replace("_", " ").capitalize() for name in found})
        if row.note:
            echo(textwrap.fill(row.note, width=80))


for _name, _row in MEASURES.items():
    if _row.help:
        _register(_name, _row)
