"""`fpq-analyze landscape`."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpq_analysis.cli.app import echo, log, new_table, print_table
from fpq_analysis.cli.measuring import Settings, check_runs, measure_and_show, measuring_command
from fpq_analysis.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from fpq_analysis.records.terrain import Terrain


# Of each run one epoch, by an option of its own.
@measuring_command(fixed={"epochs": "last"}, n_data=512)
def landscape(
    settings: Settings,
    plane: Annotated[
        str | None, typer.Option(help="random (filter-normalised), hessian (top eigenvectors), or pca of each run.")
    ] = None,
    through: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of --plane and --ckpt-dir, two or three times: a run or file to draw through."),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="What moves: dequantized, requantized, straight-through or float.")
    ] = "dequantized",
    dim: Annotated[int | None, typer.Option(help="1 for a line, 2 for a plane (the default).")] = None,
    points: Annotated[int, typer.Option(help="Grid points along each axis.")] = 25,
    span: Annotated[float | None, typer.Option(help="Axes from -span to span. Default: 1; hessian 0.5.")] = None,
    batchnorm: Annotated[
        str, typer.Option(help="pca, --through: interpolate or re-estimate statistics.")
    ] = "interpolate",
    epoch: Annotated[int | None, typer.Option(help="Epoch of each run. Default: its last.")] = None,
    html: Annotated[bool, typer.Option("--html", help="Also an interactive surface (needs plotly).")] = False,
) -> None:
    """The loss on a plane through weight space about the last checkpoint of every run, as contours and as a surface.

    Every point is kept as it is done: a stopped command goes on, and shards add up when the same command is run without
    --shard. The caption beside the figure says how it was drawn.

    [bold]Examples[/bold]

      fpq-analyze landscape --ckpt-dir checkpoints/

      fpq-analyze landscape --ckpt-dir checkpoints/fpq --plane pca --weights float

      fpq-analyze landscape --through checkpoints/lsq --through checkpoints/fpq
    """
    ends = through or []
    if ends and plane not in (None, "checkpoints"):
        raise UserError(f"--plane {plane} and --through are two planes; leave one of them out.")
    if not ends:
        check_runs(settings)
    from fpq_analysis.probes.landscape import LandscapeSettings

    probe = LandscapeSettings(
        "checkpoints" if ends else plane or "random",
        weights,
        dim if dim is not None else 1 if len(ends) == 2 else 2,
        points,
        span,
        batchnorm,
    )
    if html:
        from fpq_analysis.plots.landscape_html import check_plotly

        check_plotly()

    def show(frame: pd.DataFrame) -> None:
        from fpq_analysis.plots.landscape import landscape_caption
        from fpq_analysis.records.terrain import terrains

        found = terrains(frame)
        if found:
            _print(found)
            echo(textwrap.fill(landscape_caption(frame), width=80))

    def page(frame: pd.DataFrame) -> None:
        from fpq_analysis.plots.landscape_html import surface_html

        log(f"Page: {surface_html(frame, settings.figures / 'surface.html')}")

    if epoch is not None:
        settings = replace(settings, epochs=str(epoch))
    pages = [page] if html and probe.dim == 2 else []
    measure_and_show([probe], settings, {probe.name: show}, through=ends, rows=_with_coordinates, pages=pages)


def _print(found: list[Terrain]) -> None:
    """A row a landscape: the loss at the centre, its lowest and highest point, the grid in quantization steps."""
    import numpy as np

    from fpq_analysis.text import number

    headings = ("Epoch", "Loss", "± 95 %", "Dip", "± 95 % ", "at", "Highest", "Steps")
    table = new_table({"Run": "left", **dict.fromkeys(headings, "right")})
    for terrain in found:
        low = np.unravel_index(np.nanargmin(terrain.loss), terrain.loss.shape)
        at = ", ".join(f"{axis[i]:.2g}" for axis, i in zip(terrain.grid, low, strict=True))
        table.add_row(
            str(terrain.first["run"]),
            str(terrain.first["epoch"]),
            number(float(terrain.loss[terrain.centre]), 3),
            number(float(terrain.half[terrain.centre]), 2),
            number(float(terrain.rise[low]), 2),
            number(float(terrain.rise_half[low]), 2),
            at,
            number(float(np.nanmax(terrain.loss)), 3),
            "-" if terrain.moves != terrain.moves else number(terrain.moves, 2) + (" !" if terrain.aliased else ""),
        )
    print_table(table)
    echo("Dip: the lowest loss on the grid minus the network's own, sample by sample.")
    if any(terrain.moves == terrain.moves for terrain in found):
        echo("Steps: move of the weights in a grid step (RMS), in quantization steps.")
    if any(terrain.aliased for terrain in found):
        echo("!: more than half of one: too coarse a grid for weights that are rounded again.")


def _with_coordinates(frame: pd.DataFrame) -> pd.DataFrame:
    """The records with the coordinates of every grid point in columns `axis_1` and `axis_2`."""
    axes = {
        (row["key"], row["quantity"]): row["samples"] for row in frame.to_dict("records") if row["samples"] is not None
    }
    found: dict[str, Any] = {"axis_1": [], "axis_2": []}
    for key, quantity in zip(frame["key"], frame["quantity"], strict=True):
        kind, *places = str(quantity).split("_")
        for k, (axis, column) in enumerate(found.items()):
            is_point = kind in ("loss", "rise") and k < len(places)
            column.append(axes[key, axis][int(places[k]) - 1] if is_point else None)
    return frame.assign(**found)
