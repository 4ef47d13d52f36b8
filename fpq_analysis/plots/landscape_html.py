"""Loss landscapes to turn about in a browser: one self-contained file, by plotly."""

from __future__ import annotations

import html
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fpq_analysis.errors import UserError
from fpq_analysis.files import write_text
from fpq_analysis.plots.landscape import COLOURS, STAR, heights, landscape_caption
from fpq_analysis.records.terrain import Terrain

# Text around the figure rather than in it, so that lines break where the page ends.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Loss landscapes</title>
<style>
body {{ margin: 0 auto; max-width: 80rem; padding: 0 1rem; font: 0.9rem/1.5 system-ui, sans-serif; color: #222; }}
main {{ display: grid; grid-template-columns: repeat({columns}, minmax(0, 1fr)); }}
@media (max-width: 45rem) {{ main {{ grid-template-columns: minmax(0, 1fr); }} }}
p {{ max-width: 50rem; }}
</style>
<main>
{figures}
</main>
<p>{caption}</p>
</html>
"""


def check_plotly() -> None:
    """Raise `UserError` if plotly is not installed."""
    if find_spec("plotly") is None:
        raise UserError(
            "An interactive page needs plotly, which is not installed here: pip install 'fpq-analysis[html]'. Without "
            "--html, the figures are drawn all the same."
        )


def surface_html(records: pd.DataFrame, path: str | Path) -> Path:
    """Write the planes among the records as turnable surfaces, side by side if there is room, with the caption below.

    Args:
        records: of the probe `landscape`; columns as in `records.COLUMNS`.

    Returns:
        `path`.

    Raises:
        UserError: if plotly is not installed.
        NothingToDraw: if there is no complete plane with a finite loss.
    """
    check_plotly()
    planes, at, height, (low, high) = heights(records)
    wide = height is np.log10
    ticks: dict[str, Any] = {"tickvals": np.log10(at), "ticktext": [f"{level:g}" for level in at]} if wide else {}
    drawn = [
        _figure(terrain, height, ticks, {"cmin": low, "cmax": high}).to_html(
            full_html=False,
            include_plotlyjs=place == 0,
            default_height="30rem",
            config={"responsive": True, "displayModeBar": False},
        )
        for place, terrain in enumerate(planes)
    ]
    caption = landscape_caption(records).replace("Star:", "Diamond:")  # plotly has no star in space
    page = PAGE.format(columns=min(2, len(planes)), figures="\n".join(drawn), caption=html.escape(caption))
    path = Path(path)
    write_text(path, page)
    return path


def _figure(terrain: Terrain, height: Any, ticks: dict[str, Any], ends: dict[str, Any]) -> Any:
    bar = {"title": "Mean loss", "thickness": 12, "len": 0.7, **ticks}
    figure = import_module("plotly.graph_objects").Figure(_traces(terrain, height, colorbar=bar, **ends))
    x, y = terrain.names
    figure.update_layout(
        title={"text": terrain.title, "x": 0.5},
        scene={
            "xaxis_title": x,
            "yaxis_title": y,
            "zaxis": {"title": "Mean loss", **ticks},
            # Further away than plotly's own, and looking lower, so that the axes' titles are seen.
            "camera": {"eye": {"x": 1.5, "y": 1.5, "z": 1.2}, "center": {"x": 0, "y": 0, "z": -0.15}},
        },
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
        showlegend=False,
        font={"size": 11},
    )
    return figure


def _traces(terrain: Terrain, height: Any, **colours: Any) -> list[Any]:
    graph_objects = import_module("plotly.graph_objects")
    x, y = terrain.grid
    z = height(np.where(np.isfinite(terrain.loss), terrain.loss, np.nan))
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
        z=height((networks["value"] - networks["gap"]).to_numpy(float)),
        mode="lines+markers" if terrain.trajectory else "markers",
        marker={"size": 6, "color": STAR, "symbol": "diamond"},
        line={"width": 4, "color": STAR},
        hovertext=[str(name).replace("\n", ", ") for name in networks["name"]],
        hoverinfo="text",
    )
    return [surface, marks]
