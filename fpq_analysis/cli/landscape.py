"""`fpq-analyze landscape`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpq_analysis.cli.app import fail, fail_all, new_table, print_json, print_table, say, tell
from fpq_analysis.cli.measuring import Settings, draw, measuring_command, print_forecast
from fpq_analysis.errors import UserError, going_on

if TYPE_CHECKING:
    import pandas as pd

    from fpq_analysis.plots.landscape import Terrain


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
        str, typer.Option(help="pca, --through: interpolate or re-estimate its statistics.")
    ] = "interpolate",
    epoch: Annotated[int | None, typer.Option(help="Of each run. Default: its last.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/N, the i-th of N machines' part of the points.")] = None,
    html: Annotated[bool, typer.Option("--html", help="A page to turn the surface in, too (needs plotly).")] = False,
) -> None:
    """The loss on a plane through weight space about the last checkpoint of every run, as contours and as a surface.

    Every point is kept as it is done: a stopped command goes on, and shards add up when the same command is run without
    --shard. The caption beside the figure says how it was drawn.

    [bold]Examples[/bold]

      fpq-analyze landscape --ckpt-dir checkpoints/

      fpq-analyze landscape --ckpt-dir checkpoints/fpq --plane pca --weights float

      fpq-analyze landscape --through checkpoints/lsq --through checkpoints/fpq
    """
    from fpq_analysis.pipeline import landscapes as study
    from fpq_analysis.plots.landscape import landscape_caption, terrains
    from fpq_analysis.probes.landscape import Recipe
    from fpq_analysis.training.sweep import parse_shard

    ends = through or []
    if ends and plane not in (None, "checkpoints"):
        raise UserError(f"--plane {plane} and --through are two planes; leave one of them out.")
    recipe = Recipe(
        "checkpoints" if ends else plane or "random",
        weights,
        dim or (1 if len(ends) == 2 else 2),
        points,
        span,
        batchnorm,
    )
    if html:
        from fpq_analysis.plots.landscape_html import check_plotly

        check_plotly()
    part = parse_shard(shard) if shard else (1, 1)
    about: dict[str, Any] = {"n_data": settings.n_data, "seed": settings.seed, "model": settings.model}
    where: dict[str, Any] = {**about, "device": settings.device, "data_root": settings.data_root}
    todo = study.plan(
        settings.ckpt_dir,
        recipe,
        through=ends,
        epoch=epoch,
        shard=part,
        overwrite=settings.overwrite,
        records=settings.records,
        **about,
    )
    left = sum(len(job.cells) for job in todo.jobs)
    total = sum(job.n_cells for job in todo.jobs)
    bad = f", {len(todo.faults)} cannot be drawn" if todo.faults else ""
    say(f"{recipe.name}: {total - left} points done, {left} to do{bad}")
    if settings.dry_run:
        print_forecast(study.forecast(todo, recipe, **where))
        return
    faults: dict[Path, UserError] = {}
    undrawn: list[UserError] = []
    frame = study.carry_out(todo, recipe, shard=part, on_fault=faults.__setitem__, **where)
    found = terrains(frame)
    if settings.json:
        print_json(_with_coordinates(frame))
    else:
        _print(found)
    tried = [job for job in todo.jobs if job.path not in faults]
    if len(found) < len(tried):
        say("Points of other shards are missing; when these are done, run the command without --shard to draw.")
    elif found:
        if not settings.json:
            tell(textwrap.fill(landscape_caption(frame), width=80))
        undrawn = draw(recipe.name, frame, settings.figures)
        if html and recipe.dim == 2:
            from fpq_analysis.plots.landscape_html import surface_html

            with going_on(undrawn.append, "The page"):
                say(f"Page: {surface_html(frame, settings.figures / 'surface.html')}")
    if faults:
        say(f"{len(faults)} of {len(todo.jobs) + len(todo.faults)} landscapes could not be drawn.")
    for fault in undrawn:
        fail(fault)
    fail_all(faults)
    if undrawn:
        raise typer.Exit(1)


def _print(found: list[Terrain]) -> None:
    """A row a landscape: the loss at the centre, its lowest and highest point, the grid in quantization steps."""
    import numpy as np

    from fpq_analysis.records.comparison import number

    if not found:
        return
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
    tell("Dip: the lowest loss on the grid minus the network's own, image by image.")
    if any(terrain.moves == terrain.moves for terrain in found):
        tell("Steps: move of the weights in a grid step (RMS), in quantization steps.")
    if any(terrain.aliased for terrain in found):
        tell("!: more than half of one: too coarse a grid for weights that are rounded again.")


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
