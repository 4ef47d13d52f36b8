"""Loss landscapes to turn about in a browser: one self-contained file, by plotly."""

from __future__ import annotations

import textwrap
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fpq_analysis.errors import UserError
from fpq_analysis.plots.landscape import COLOURS, STAR, Terrain, by_dimension, landscape_caption, levels


def check_plotly() -> None:
    """Raise `UserError` if plotly is not installed."""
    if find_spec("plotly") is None:
        raise UserError(
            "An interactive page needs plotly, which is not installed here: pip install 'fpq-analysis[html]'. Without "
            "--html, the figures are drawn all the same."
        )


def surface_html(records: pd.DataFrame, path: str | Path) -> Path:
    """Write the planes among the records as turnable surfaces, two in a row, with the caption below.

    Args:
        records: of the probe `landscape`; columns as in `records.COLUMNS`.

    Returns:
        `path`.

    Raises:
        UserError: if plotly is not installed.
        ValueError: if there is no complete plane with a finite loss.
    """
    check_plotly()
    planes, _ = by_dimension(records)
    if not planes:
        raise ValueError("no complete plane among the records")
    at, wide = levels([terrain.loss for terrain in planes])
    across = min(2, len(planes))
    down = -(-len(planes) // across)
    figure = import_module("plotly.subplots").make_subplots(
        rows=down,
        cols=across,
        specs=[[{"type": "surface"}] * across] * down,
        subplot_titles=[terrain.title for terrain in planes],
    )
    ticks: dict[str, Any] = {"tickvals": np.log10(at), "ticktext": [f"{level:g}" for level in at]} if wide else {}
    finite = np.concatenate([terrain.loss[np.isfinite(terrain.loss)] for terrain in planes])
    ends = {"cmin": _height(finite.min(), wide), "cmax": _height(finite.max(), wide)}
    for place, terrain in enumerate(planes):
        where = {"row": place // across + 1, "col": place % across + 1}
        bar = {"title": "Mean loss", **ticks} if place == 0 else None
        for trace in _traces(terrain, wide, showscale=place == 0, colorbar=bar, **ends):
            figure.add_trace(trace, **where)
        x, y = terrain.names
        figure.update_scenes(xaxis_title=x, yaxis_title=y, zaxis={"title": "Mean loss", **ticks}, **where)
    figure.update_layout(
        height=520 * down + 160,
        margin={"b": 160},
        showlegend=False,
        annotations=[*figure.layout.annotations, _below(landscape_caption(records))],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
    return path


def _traces(terrain: Terrain, wide: bool, **colours: Any) -> list[Any]:
    graph_objects = import_module("plotly.graph_objects")
    x, y = terrain.grid
    z = _height(np.where(np.isfinite(terrain.loss), terrain.loss, np.nan), wide)
    text = (
        f"{terrain.names[0]}: %{{x:.3g}}<br>{terrain.names[1]}: %{{y:.3g}}<br>loss: %{{customdata:.4g}}<extra></extra>"
    )
    surface = graph_objects.Surface(
        x=x, y=y, z=z.T, customdata=terrain.loss.T, hovertemplate=text, colorscale=COLOURS, **colours
    )
    networks = terrain.networks
    if networks.empty:
        here = terrain.loss[terrain.centre]
        networks = pd.DataFrame([{"x": 0.0, "y": 0.0, "value": here, "gap": 0.0, "name": "the network itself"}])
    marks = graph_objects.Scatter3d(
        x=networks["x"],
        y=networks["y"],
        z=_height((networks["value"] - networks["gap"]).to_numpy(float), wide),
        mode="lines+markers" if terrain.trajectory else "markers",
        marker={"size": 4, "color": STAR},
        line={"width": 4, "color": STAR},
        hovertext=[str(name).replace("\n", ", ") for name in networks["name"]],
        hoverinfo="text",
    )
    return [surface, marks]


def _height(loss: Any, wide: bool) -> Any:
    return np.log10(loss) if wide else loss


def _below(caption: str) -> dict[str, Any]:
    """The caption as an annotation, in lines of a length that a page holds."""
    text = "<br>".join(textwrap.wrap(caption, 140))
    return {
        "text": text,
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": 0,
        "y": 0,
        "yanchor": "top",
        "align": "left",
        "font": {"size": 12},
    }
