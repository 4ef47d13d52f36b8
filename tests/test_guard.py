"""The guard bites, in one process and with workers; and lets everything else pass."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guard import changes, snapshot

GOOD = """
from pathlib import Path
ROOT = Path(__file__).parent

def test_it(tmp_path):
    (ROOT / "__pycache__").mkdir(exist_ok=True)
    (tmp_path / "figure5.txt").write_text("ours")
"""
BAD = """
    (ROOT / "figures" / "figure5.txt").write_text("ours")
    (ROOT / "figures" / "figure1.txt").write_text("ours")
    (ROOT / "README.md").unlink()
"""


@pytest.mark.parametrize(("test", "workers"), [(GOOD, "1"), (GOOD + BAD, "0"), (GOOD + BAD, "1")])
def test_a_run_that_changes_the_tree_fails(test, workers, tmp_path):
    root = tmp_path / "tree"
    (root / "figures").mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "guard.py", root / "conftest.py")
    (root / "figures" / "figure1.txt").write_text("the user's")
    (root / "README.md").touch()
    (root / "pytest.ini").touch()
    (root / "test_it.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", workers]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout
    said = ["README.md is gone", "figures/figure1.txt was written to", "figures/figure5.txt is new"]
    assert [line for line in said if line in done.stdout.splitlines()] == (said if test != GOOD else [])
    assert done.returncode == (test != GOOD)


def test_what_is_not_looked_at(tmp_path):
    before = snapshot(tmp_path)
    for folder in (".git", ".venv", "new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").touch()
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    assert changes(before, snapshot(tmp_path)) == ["new is new", "new/a is new"]
