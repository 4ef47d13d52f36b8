"""`fpq-analyze compare`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.cli.app import (
    DataRoot,
    Device,
    Engine,
    Jobs,
    Json,
    Model,
    NData,
    Records,
    Seed,
    app,
    echo,
    fail_all,
    guarded,
    log,
    new_table,
    print_json,
    print_table,
    reads_foreign,
)
from fpq_analysis.errors import UserError

if TYPE_CHECKING:
    from fpq_analysis.runs import Source


@app.command()
@guarded
@reads_foreign("run_a", "run_b")
def compare(
    run_a: Annotated[Path, typer.Argument(help="A run.")],
    run_b: Annotated[Path, typer.Argument(help="The run it is compared with.")],
    definition: Annotated[str, typer.Option(help="dequantized, latent or float.")] = "dequantized",
    n_data: NData = 1024,
    seed: Seed = 0,
    data_root: DataRoot = None,
    model: Model = None,
    records: Records = None,
    device: Device = "auto",
    jobs: Jobs = "1",
    executor: Engine = None,
    json: Json = False,
) -> None:
    """Difference of two runs' Hessian traces, epoch by epoch, on the same images.

    Image by image, so that the interval is that of the difference: two runs share most of their error over the data.
    What is not measured yet is measured first.

    [bold]Example[/bold]

      fpq-analyze compare checkpoints/demo/fpq-w4a4 checkpoints/demo/lsq-w4a4
    """
    import pandas as pd

    from fpq_analysis.pipeline.run import measure
    from fpq_analysis.probes import HessianTrace
    from fpq_analysis.records.comparison import by_epoch, told_apart
    from fpq_analysis.records.queries import totals
    from fpq_analysis.runs import source_of
    from fpq_analysis.text import number

    pair = [_one_run(folder, source_of(folder)) for folder in (run_a, run_b)]
    names = told_apart(*pair)
    faults: dict[Path, UserError] = {}
    traces = [
        totals(
            measure(
                run,
                HessianTrace(definition),
                n_data=n_data,
                seed=seed,
                device=device,
                data_root=data_root,
                model=model,
                records=records,
                jobs=jobs,
                executor=executor,
                on_fault=faults.__setitem__,
            )
        )
        for run in (run_a, run_b)
    ]
    if any(frame.empty for frame in traces):
        fail_all(faults)
    for run, frame in zip(pair, traces, strict=True):
        if frame.empty:
            raise UserError(f"No checkpoint of '{run}' has a finite trace, so there is nothing to compare.")
    found = by_epoch(*(frame.assign(run=name) for frame, name in zip(traces, names, strict=True)))
    if json:
        print_json(pd.DataFrame([vars(difference) | {"ci95": difference.ci95} for difference in found]))
        fail_all(faults)
        return
    headings = ("Epoch", *names, "Difference", "± 95 %")  # a run may be called like another column
    table = new_table([(heading, "right") for heading in headings])
    for difference in found:
        ours = difference.baseline_value + difference.value
        numbers = (ours, difference.baseline_value, difference.value)
        table.add_row(str(difference.epoch), *(number(x, 4) for x in numbers), number(difference.ci95, 2))
    print_table(table)
    log("")
    echo(textwrap.fill(found[-1].sentence(), width=80))
    how = "Paired, image by image" if found[-1].paired else "Not paired (the measurement does not see single images)"
    echo(f"{how}: {n_data} training images; one training run each.")
    fail_all(faults)


def _one_run(folder: Path, source: Source) -> Path:
    found = source.find_runs(folder)
    if len(found) > 1:
        held = ", ".join(sorted(run.name for run in found)[:3])
        raise UserError(f"'{folder}' holds more than one run ({held}); name one of them.")
    return found[0]
