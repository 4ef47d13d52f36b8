"""Loss landscapes: contours on planes, lines with bands, and surfaces in three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from scipy.interpolate import RegularGridInterpolator

from fpq_analysis.errors import NothingToDraw
from fpq_analysis.plots.axes import MARKED, abreast, head, legend, log_ticks, panels
from fpq_analysis.plots.names import Looks, titles
from fpq_analysis.plots.style import COLUMNS, WIDTHS, style
from fpq_analysis.records.queries import ordered, samples_of
from fpq_analysis.records.seeds import families
from fpq_analysis.records.terrain import Terrain, terrains

COLOURS = "cividis"  # even in lightness, and much the same for all common forms of colour vision
STAR = "#D55E00"
# Losses that span more than this factor are drawn on a logarithmic scale, with levels from the finest of these series
# that has not too many of them.
WIDE = 20.0
SERIES = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
MOST_LEVELS = 15
FINE = 120  # points along an axis of what is drawn
WEIGHTS = {
    "dequantized": "the weights Q(w) that the network uses, moved as plain numbers",
    "requantized": "the trained w, rounded again at every point",
    "straight-through": "the trained w, with the rounding residue Q(w) - w and the clipping of the centre kept fixed",
    "float": "the trained w, without quantizers",
}


def levels(losses: Sequence[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Contour levels for all of these losses, and whether they are logarithmic."""
    values = np.concatenate([loss[np.isfinite(loss)] for loss in losses])
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > WIDE * low:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for series in SERIES:
            all_levels = np.array([step * 10.0**decade for decade in decades for step in series])
            inside = all_levels[(all_levels >= low) & (all_levels <= high)]
            if len(inside) <= MOST_LEVELS:
                break
        return inside, True
    return np.array(MaxNLocator(MOST_LEVELS - 2).tick_values(low, high if high > low else low + 1)), False


@style()
def landscape_figure(records: pd.DataFrame) -> Figure:
    """Contours of the mean loss, a panel for each plane, all on one scale; and lines.

    Star: the network the landscape is about.  Circles: a trajectory's checkpoints, projected, or the networks the plane
    goes through.  Hatched: the loss is not finite.  Along a line the band is the 95 % interval of the difference from
    the centre, and the bar at the centre that of the loss there.

    From records of the probe `landscape`; raises `NothingToDraw` if there is no complete landscape with a finite loss.
    """
    planes, lines = by_dimension(records)
    figure, places = panels(len(planes) + len(lines), _height(len(planes) + len(lines)))
    looks = Looks(families(pd.DataFrame([line.first for group in lines for line in group]))) if lines else Looks([])
    found = zip(places[len(planes) :], lines, strict=True)
    legend(figure, [artist for axes, group in found for artist in _draw_lines(axes, group, looks)])
    if planes:
        at, wide = levels([terrain.loss for terrain in planes])
        norm = LogNorm(at[0], at[-1]) if wide else Normalize(at[0], at[-1])
        drawn = [_draw_plane(axes, terrain, at, norm) for axes, terrain in zip(places, planes, strict=False)]
        beside = [filled.axes for filled in drawn]
        down = places[0].get_subplotspec().get_gridspec().nrows  # type: ignore[union-attr]
        bar = figure.colorbar(drawn[0], ax=beside, ticks=at, label="Mean loss", pad=0.02, aspect=25 * down)
        bar.ax.minorticks_off()
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    return figure


def by_dimension(records: pd.DataFrame) -> tuple[list[Terrain], list[list[Terrain]]]:
    """Planes; and lines, those drawn in one way together."""
    records = ordered(records)
    planes: list[Terrain] = []
    lines: dict[tuple[Any, ...], list[Terrain]] = {}
    for terrain in terrains(records):
        if not np.isfinite(terrain.loss).any():
            continue
        if len(terrain.grid) == 2:
            planes.append(terrain)
        else:
            lines.setdefault((terrain.first["definition"], terrain.first["estimator"]), []).append(terrain)
    if not planes and not lines:
        raise NothingToDraw("no complete landscape among the records")
    return planes, list(lines.values())


def _height(n: int) -> float:
    """Of a panel, so that a plane beside others is square."""
    return min(2.5, 0.82 * WIDTHS[COLUMNS.get()] / abreast(n))


def smoothed(terrain: Terrain, wide: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finer coordinates of a plane and its loss there, by cubics that run through every point and invent no minimum.

    Piecewise cubic Hermite interpolation (Fritsch & Butland 1984) along both axes, of the loss's logarithm if `wide`.
    As it is where a loss is not finite, and where it is aliased: between stairs there is nothing smooth.
    """
    x, y = terrain.grid
    if terrain.aliased or not np.isfinite(terrain.loss).all() or min(len(x), len(y)) < 4:
        return x, y, terrain.loss
    fine_x, fine_y = (np.unique(np.concatenate([axis, np.linspace(axis[0], axis[-1], FINE)])) for axis in (x, y))
    loss = np.log(terrain.loss) if wide else terrain.loss
    found = RegularGridInterpolator((x, y), loss, method="pchip")(tuple(np.meshgrid(fine_x, fine_y, indexing="ij")))
    return fine_x, fine_y, np.exp(found) if wide else found


def _draw_plane(axes: Axes, terrain: Terrain, at: np.ndarray, norm: Normalize) -> Any:
    x, y, loss = smoothed(terrain, isinstance(norm, LogNorm))
    loss = np.ma.masked_invalid(loss.T)
    drawn = axes.contourf(x, y, loss, levels=at, norm=norm, cmap=COLOURS, extend="both")
    lines = axes.contour(x, y, loss, levels=at, colors="black", linewidths=0.4, alpha=0.6)
    for text in axes.clabel(lines, list(at[::2]), fontsize=6, fmt="%g", inline=False):
        text.set_path_effects(_outline(1.5))
        across, up = (
            (place - axis[0]) / (axis[-1] - axis[0]) for place, axis in zip(text.get_position(), (x, y), strict=True)
        )
        centre = math.hypot(
            *((place - 0) / (axis[-1] - axis[0]) for place, axis in zip(text.get_position(), (x, y), strict=True))
        )
        text.set_visible(min(across, up, 1 - across, 1 - up) > 0.05 and centre > 0.08)  # neither cut nor under the star
    if np.ma.getmaskarray(loss).any():
        axes.patch.set(hatch="////", edgecolor="0.6", facecolor="white")
    axes.grid(False)
    axes.set_box_aspect(1)
    head(axes, terrain.heading)
    axes.set_xlabel(terrain.names[0])
    axes.set_ylabel(terrain.names[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    networks = terrain.networks
    if len(networks):
        if terrain.trajectory:
            axes.plot(networks["x"], networks["y"], "-", color="black", linewidth=1.0, path_effects=_outline(2.5))
        axes.plot(networks["x"], networks["y"], "o", color="black", markersize=4, markeredgecolor="white", mew=0.8)
        _name_networks(axes, terrain, networks["y"])
    axes.plot(0, 0, "*", color=STAR, markersize=10, markeredgecolor="white", mew=0.8)
    return drawn


def _name_networks(axes: Axes, terrain: Terrain, heights: pd.Series) -> None:
    """Above each network its name, of a trajectory the ends only."""
    networks = terrain.networks
    for place, (name, x, y) in enumerate(zip(networks["name"], networks["x"], heights, strict=True)):
        if not terrain.trajectory or place in (0, len(networks) - 1):
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
            words: dict[str, Any] = {"fontsize": 7, "ha": "center", "va": "bottom", "linespacing": 0.95, "bbox": box}
            axes.annotate(name, (x, y), (0, 7), textcoords="offset points", zorder=5, **words)


def _outline(width: float) -> list[Any]:
    return [withStroke(linewidth=width, foreground="white")]


def _draw_lines(axes: Axes, lines: list[Terrain], looks: Looks) -> list[Any]:
    """Returns what a legend should name: of a single line nothing, as the panel's title does."""
    artists: list[Any] = []
    wide = levels([line.loss for line in lines])[1]
    least = min(float(np.nanmin(line.loss)) for line in lines)
    for line in lines:
        (x,) = line.grid
        look = looks.line(line.first) | {"markevery": max(1, len(x) // MARKED)}
        if len(line.networks):
            look = {"color": "black", "linestyle": look["linestyle"]}
        color = look["color"]
        artists += axes.plot(x, line.loss, **look, label=line.title)
        low, high = line.loss - line.rise_half, line.loss + line.rise_half
        here, half = line.loss[line.centre], line.half[line.centre]
        # A logarithmic axis has no room below zero.
        low, bottom = (np.maximum(low, 0.5 * least), max(here - half, 0.5 * least)) if wide else (low, here - half)
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.errorbar([0], [here], [[here - bottom], [half]], color=color, linewidth=1.0, capsize=2, fmt="none")
        if len(line.networks):
            axes.plot(line.networks["x"], line.networks["value"], "o", color=color, markeredgecolor="white", ms=5)
            _name_networks(axes, line, line.networks["value"])
    if wide:
        axes.set_yscale("log")
        log_ticks(axes.yaxis, max(float(np.nanmax(line.loss)) for line in lines) / least)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(lines[0].names[0] if len(lines) == 1 else lines[0].names[0].partition(" (")[0])
    axes.set_ylabel("Mean loss")
    if len(lines) > 1:
        return artists
    head(axes, lines[0].heading)
    return []


@style()
def surface_figure(records: pd.DataFrame) -> Figure:
    """The mean loss above each plane, all on one scale; its axis is logarithmic where losses span much.

    From records of the probe `landscape`; raises `NothingToDraw` if there is no complete plane with a finite loss.
    """
    planes, at, height, (low, high) = heights(records)
    figure, places = panels(len(planes), 2.4, across=(1, 2), projection="3d", computed_zorder=False)
    axes: Any
    for axes, terrain in zip(places, planes, strict=True):
        _draw_surface(axes, terrain, height, Normalize(low, high))
        axes.set_zlim(low, high if high > low else low + 1)
        if height is np.log10:
            axes.zaxis.set_major_locator(FixedLocator(list(np.log10(at[:: 1 + len(at) // 6]))))
            axes.zaxis.set_major_formatter(FuncFormatter(lambda power, _: f"{10.0**power:g}"))
    return figure


def heights(records: pd.DataFrame) -> tuple[list[Terrain], np.ndarray, Any, tuple[float, float]]:
    """The planes, levels of their losses, what turns a loss into a height (`np.log10` if they span much), its ends."""
    planes, _ = by_dimension(records)
    if not planes:
        raise NothingToDraw("no complete plane among the records")
    at, wide = levels([terrain.loss for terrain in planes])
    height = np.log10 if wide else np.asarray
    finite = np.concatenate([terrain.loss[np.isfinite(terrain.loss)] for terrain in planes])
    return planes, at, height, (float(height(finite.min())), float(height(finite.max())))


def _draw_surface(axes: Any, terrain: Terrain, height: Any, norm: Normalize) -> None:
    *grid, loss = smoothed(terrain, height is np.log10)
    x, y = np.meshgrid(*grid, indexing="ij")
    z = height(np.where(np.isfinite(loss), loss, np.nan))
    every = 5 if loss.size > terrain.loss.size else 1
    axes.plot_surface(x, y, z, cmap=COLOURS, norm=norm, rstride=every, cstride=every, linewidth=0.08, edgecolor="black")
    networks = terrain.networks
    if len(networks):
        on_plane = height((networks["value"] - networks["gap"]).to_numpy(float))
        axes.plot(networks["x"], networks["y"], on_plane, "o-" if terrain.trajectory else "o", color=STAR, ms=3, lw=1.2)
    axes.plot(
        [0],
        [0],
        [height(terrain.loss[terrain.centre])],
        "*",
        color=STAR,
        markersize=9,
        markeredgecolor="white",
        mew=0.8,
    )
    axes.view_init(elev=38, azim=-55)
    axes.set_box_aspect(None, zoom=0.86)  # so that the axes' names stay inside
    head(axes, terrain.heading)
    axes.tick_params(labelsize=6, pad=-2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(terrain.names[0], fontsize=7, labelpad=-5)
    axes.set_ylabel(terrain.names[1], fontsize=7, labelpad=-5)
    axes.set_zlabel("Mean loss", fontsize=7, labelpad=-6)


def landscape_caption(records: pd.DataFrame) -> str:
    """What a reader must know beside the figure: how it was drawn."""
    found = terrains(records)
    groups: dict[tuple[Any, ...], list[Terrain]] = {}
    for terrain in found:
        drawn_so = terrain.first["definition"], terrain.first["estimator"], len(terrain.grid)
        groups.setdefault(drawn_so, []).append(terrain)

    def several(column: str) -> str:
        return ", ".join(sorted({str(t.first[column]) for t in found if t.first[column] == t.first[column]} - {"None"}))

    seed = f"; seed {several('seed')}" if several("seed") else ""
    about = f"BatchNorm in eval mode; {several('n_data')} {samples_of(records)} without augmentation{seed}."
    if several("dataset"):
        about += (
            f" Data: {titles(records[records['dataset'].notna()], 'dataset')}; network: {titles(records, 'model')}."
        )
    return " ".join([*map(_how, groups.values()), about, *_warnings(found)])


def _how(group: list[Terrain]) -> str:
    first = group[0].first
    size = " x ".join(str(len(axis)) for axis in group[0].grid)
    text = f"Mean loss at {size} points: {first['estimator']}. Weights: {first['definition']}"
    text += f" ({WEIGHTS[first['definition']]})."
    errors = ", ".join(_number(terrain.half[terrain.centre]) for terrain in group)
    if len(group[0].grid) == 2:
        text += f" Star: the network itself, where the loss is known to ± {errors} (95 %, over the samples)."
    else:
        text += " Zero: the network itself, with the 95 % interval of its loss over the samples; band: the 95 % "
        text += "interval of the difference from it, sample by sample."
    for terrain in group:
        if len(terrain.networks):
            worst = terrain.networks["gap"].abs().max()
            whose = f"{terrain.title}: " if len(group) > 1 else ""
            if terrain.trajectory:
                text += f" {whose}{100 * terrain.explained:.0f} % of the squared distances lie on what is drawn."
                whose = ""
            text += f" {whose}Loss at a checkpoint and at its projection differ by at most {_number(worst)}."
    return text


def _warnings(found: list[Terrain]) -> list[str]:
    texts = []
    aliased = [terrain.moves for terrain in found if terrain.aliased]
    if aliased:
        texts.append(
            f"Aliased: a grid step moves the weights by up to {_number(max(aliased))} quantization steps (root mean "
            "square), so single stairs are not resolved, and smoothness between points means nothing."
        )
    bad = sum(int((~np.isfinite(terrain.loss)).sum()) for terrain in found)
    if bad:
        texts.append(f"At {bad} points the loss is not finite (hatched, or left out).")
    return texts


def _number(value: float) -> str:
    return f"{value:.2g}"
