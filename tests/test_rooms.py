"""The rooms of `docs/architecture.md`: data flow one way, a file has one job, and drawing needs no torch."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import fpq_analysis

PACKAGE = Path(fpq_analysis.__file__).parent
ANYWHERE = {"errors", "devices", "intervals", "progress", "text", "files", "schema", "settings", "__version__"}
ANYWHERE |= {"choices", "nests", "batch", "forward", "references", "ranks", "loss_titles"}
# Room: what it may import of the package, beside itself and what may be imported anywhere.  Only rooms above it.
ROOMS = {
    "methods": set(),
    "measures": set(),
    "quantspec": {"methods"},
    "linalg": set(),
    "losses": set(),
    "curvature": {"linalg", "losses"},
    "data": set(),
    "models": set(),
    "quantizers": {"methods", "quantspec"},
    "runs": {"data", "models", "quantizers"},
    "training": {"data", "methods", "models", "quantizers", "quantspec", "runs"},
    "records": {"methods"},
    "plots": {"measures", "methods", "records"},
    "probes": {"curvature", "linalg", "losses", "measures", "methods", "models", "plots", "quantizers", "records"},
    "report": {"measures", "methods", "plots", "records", "runs"},
    "pipeline": {"data", "losses", "models", "plots", "probes", "quantizers", "records", "report", "runs"}
    | {"training"},
    "integrations": {
        "curvature",
        "data",
        "losses",
        "methods",
        "models",
        "pipeline",
        "probes",
        "quantizers",
        "quantspec",
        "records",
        "runs",
    },
    "compat": {"curvature", "losses", "plots", "probes"},
    "doctor": {"curvature", "data", "losses", "models", "probes", "quantizers", "runs"},
}
ROOMS["cli"] = ROOMS["__init__"] = set(ROOMS)
ROOMS["__main__"] = {"cli"}
FILES = sorted(PACKAGE.rglob("*.py"))
LINES = 400
TOO_LONG: set[str] = {  # until each is two files, or fewer lines
}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules and names of the package that a file imports: `fpq_analysis.runs`, `fpq_analysis.__version__`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fpq_analysis":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "fpq_analysis" else {n if n in MODULES else node.module for n in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fpq_analysis"}
    return found


@every_file
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ROOMS.get(room, set()) | ANYWHERE | {room}
    assert {name.split(".")[1] for name in imports(path)} <= allowed


def test_every_room_is_in_the_table_below_what_it_imports():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms - ANYWHERE == set(ROOMS)
    for place, (room, allowed) in enumerate(ROOMS.items()):
        assert allowed <= set(list(ROOMS)[:place]), room


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items() if path.stem != "__main__"}
    del graph["fpq_analysis"]  # imports nothing before it is asked for a name
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


@every_file
def test_a_file_says_its_one_job_and_has_no_room_for_two(path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said, "no docstring"
    lines = len(path.read_text().splitlines())
    too_long = str(path.relative_to(PACKAGE)) in TOO_LONG
    assert (lines > LINES) == too_long, f"{lines} lines; TOO_LONG lists the files of more than {LINES}, and shrinks"


def test_the_list_of_long_files_is_of_files():
    assert all((PACKAGE / name).exists() for name in TOO_LONG)


@pytest.mark.parametrize("module", ["", ".cli", ".pipeline.plan", ".pipeline.figures", ".report.page"])
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
