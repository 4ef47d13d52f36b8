"""Pages of `docs/` with a user's own code: files are written, code and commands run, and print what they say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_extending import blocks

ROOT = Path(__file__).parent.parent
FILE = re.compile(r"# (\S+\.py)\n")
PAGES = ["data.md", "quantizers/torch_ao.md", "quantizers/torchao.md", "quantizers/brevitas.md", "quantizers/own.md"]
NEEDS = ("torchao", "brevitas")  # what pages of these names cannot do without


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_followed(page, tmp_path):
    if Path(page).stem in NEEDS:
        pytest.importorskip(Path(page).stem)
    text = (ROOT / "docs" / page).read_text()
    code = blocks(text, "python")
    assert sum(bool(line.strip()) for block in code for line in block.splitlines()) <= 40

    def run(*command: str) -> str:
        env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
        done = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for block in code:
        if file := FILE.match(block):
            (tmp_path / file[1]).write_text(block[file.end() :])
    examples = "".join(block for block in code if not FILE.match(block))
    assert run(sys.executable, "-c", examples).splitlines() == re.findall(r"^# (\d.*)$", examples, re.MULTILINE)
    for line in re.findall(r"^\$ (.*)$", "".join(blocks(text, "console")), re.MULTILINE):
        program, *arguments = shlex.split(line)
        assert program == "fpq-analyze"
        run(sys.executable, "-P", "-m", "fpq_analysis.cli", *arguments, "--device", "cpu")
