"""The notebooks run on any folder of checkpoints by changing one path, and are what their text form says."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from fpq_analysis.records.sentences import ONE_RUN
from fpq_analysis.training import TrainConfig, train

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ("quickstart", *(f"figure{i}" for i in range(1, 6)))


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory):
    """Runs as the demo's, but for their number and length."""
    root = tmp_path_factory.mktemp("demo")
    train(TrainConfig(epochs=1, lr=0.1, batch_size=128), root / "fp", device="cpu", log=str)
    for method in ("lsq", "fpq"):
        config = TrainConfig(method=method, bits="W2A4", init=str(root / "fp"), epochs=1, batch_size=128)
        train(config, root / f"{method}-w2a4", device="cpu", log=str)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_other_checkpoints(name, demo_runs, tmp_path):
    book = jupytext.read(FOLDER / f"{name}.py")
    changed, n_data = 0, 512 if name == "figure2" else 256  # of several minibatches
    for cell in book.cells:
        cell.source, n = re.subn(r'CKPT_DIR = "[^"]*"', f'CKPT_DIR = "{demo_runs}"', cell.source)
        changed += n
        # The 1,024 samples of the notebooks take a minute.
        cell.source = re.sub(r"(measure\(\w+, [\w.]+\(\))(, n_data=256)?", rf"\1, n_data={n_data}", cell.source)
    assert changed == 1
    NotebookClient(book, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    pictures = [
        output for cell in book.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == (name != "quickstart")
    last = book.cells[-1].outputs
    sentence = last[-1]["text"].splitlines()[0]  # whether there is a difference or none
    assert re.match(r"The .* of .* at epoch 1\b", sentence), last
    assert " ± " in sentence
    assert "nan" not in sentence
    assert ONE_RUN in last[-1]["text"]


@pytest.mark.parametrize("name", NAMES)
def test_the_executed_one_is_the_same(name):
    path = FOLDER / f"{name}.ipynb"
    book, text = nbformat.read(path, as_version=4), jupytext.read(FOLDER / f"{name}.py")
    assert [(cell.cell_type, cell.source) for cell in book.cells] == [
        (cell.cell_type, cell.source) for cell in text.cells
    ]
    assert path.stat().st_size < 2**20
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.execution_count, "not executed: make notebooks"
            assert all(output.output_type != "error" for output in cell.outputs)


def test_there_is_no_other():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES) == {path.stem for path in FOLDER.glob("*.py")}
