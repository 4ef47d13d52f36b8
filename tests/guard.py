"""A run of the tests fails if it changed anything in the tree: a pytest plugin, loaded by conftest.py.

Tests write below their temporary folders only.  What lies in the tree are the user's own checkpoints and figures, and a
test that leaves out an option must not replace them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CACHES = {".git", "__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache", ".ipynb_checkpoints"}
CACHES |= {"build"}  # what coverage writes
Snapshot = dict[str, tuple[int, int] | None]
BEFORE = pytest.StashKey[Snapshot]()
CHANGES = pytest.StashKey[list[str]]()


def snapshot(root: Path) -> Snapshot:
    """Size and time of every file below `root`, nothing of folders; caches and virtual environments left out."""
    found: Snapshot = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if name not in CACHES and not os.path.exists(f"{folder}/{name}/pyvenv.cfg")
        ]
        for name in files:
            if name not in CACHES:  # .git is a file in a worktree
                about = os.lstat(f"{folder}/{name}")
                found[os.path.relpath(f"{folder}/{name}", root)] = (about.st_size, about.st_mtime_ns)
        found |= {os.path.relpath(f"{folder}/{name}", root): None for name in folders}
    return found


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """What is new, gone or written to, in words."""
    said = [f"{name} is new" for name in after.keys() - before.keys()]
    said += [f"{name} is gone" for name in before.keys() - after.keys()]
    said += [f"{name} was written to" for name in before.keys() & after.keys() if before[name] != after[name]]
    return sorted(said)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once: with pytest-xdist, in the process that starts the workers
        config.stash[BEFORE] = snapshot(config.rootpath)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if BEFORE in config.stash:
        config.stash[CHANGES] = changes(config.stash[BEFORE], snapshot(config.rootpath))
        if config.stash[CHANGES] and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    said = config.stash.get(CHANGES, [])
    if said:
        terminalreporter.section("the tree was changed", sep="=", red=True, bold=True)
        for line in said[:20]:
            terminalreporter.line(line, red=True)
        if len(said) > 20:
            terminalreporter.line(f"and {len(said) - 20} more", red=True)
        terminalreporter.line(
            "FAILED: tests write below tmp_path only. If it was not them (an editor, a run beside), run them again.",
            red=True,
        )
