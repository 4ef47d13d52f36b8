"""Who may import whom: the data flow one way, and drawing needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fpq_analysis

PACKAGE = Path(fpq_analysis.__file__).parent
ANYWHERE = {"errors", "files", "schema", "text"}
# Room: what it may import of the package, beside itself and what may be imported anywhere.
ROOMS = {
    "errors": set(),
    "files": set(),
    "text": set(),
    "schema": set(),
    "progress": set(),
    "devices": set(),
    "linalg": set(),
    "models": set(),
    "data": set(),
    "quantizers": set(),
    "curvature": {"linalg"},
    "runs": set(),
    "factories": set(),
    "checkpoint": {"models", "quantizers", "runs"},
    "foreign": {"checkpoint", "data", "factories", "models", "quantizers", "runs"},
    "training": {"data", "models", "quantizers", "checkpoint", "devices", "progress", "runs"},
    "probes": {"curvature", "linalg", "models", "progress", "quantizers", "records"},
    "records": set(),
    "comparison": set(),
    "pipeline": {"checkpoint", "data", "devices", "factories", "foreign", "models", "plots", "probes", "progress"}
    | {"records", "report", "runs", "training", "__version__"},
    "plots": {"records"},
    "report": {"comparison", "plots", "records", "runs", "__version__"},
    "compat": {"curvature", "plots", "probes"},
    "doctor": {"checkpoint", "curvature", "data", "devices", "foreign", "models", "quantizers"},
    "inspection": {"checkpoint", "foreign", "runs"},
    "tables": {"runs"},
    "export": {"checkpoint", "quantizers", "runs"},
    "cli": None,  # anything
    "__init__": None,
}


def imports(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fpq_analysis"):
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fpq_analysis.")}
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ROOMS[room]
    if allowed is not None:
        assert imports(path) <= allowed | ANYWHERE | {room}


@pytest.mark.parametrize("module", ["", ".cli", ".pipeline.figures", ".report"])
def test_no_torch_is_loaded(module):
    code = f"import sys, fpq_analysis{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_can_be_imported():
    assert dir(fpq_analysis) == sorted(fpq_analysis.__all__)
    for name in fpq_analysis.__all__:
        assert getattr(fpq_analysis, name).__doc__
    with pytest.raises(AttributeError):
        _ = fpq_analysis.nothing


def test_types_are_there_for_users_of_the_package():
    assert (PACKAGE / "py.typed").exists()
