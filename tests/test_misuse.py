"""A misused command answers before torch is loaded, and help before anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fpq_analysis import choices
from fpq_analysis.cli import app
from fpq_analysis.losses.table import LOSSES
from fpq_analysis.models import MODELS
from tests.words import words

# Which of these are loaded once a command has answered.  One process for all: a command that loads one is the first.
CODE = """
import json, sys
from typer.testing import CliRunner
from fpq_analysis.cli import app
heavy, answers = sys.argv[1].split(","), []
for command in json.load(sys.stdin):
    result = CliRunner().invoke(app, command.split())
    answers.append([command, result.exit_code, result.stderr or result.output, [n for n in heavy if n in sys.modules]])
json.dump(answers, sys.stdout)
"""
FOLDERS = [
    f"{command} --ckpt-dir {folder}{more}"
    for command in ("hessian", "gradnorm", "variance", "features", "drift", "noise", "oscillation", "landscape")
    for folder in ("nowhere", "empty")
    for more in ("", " --model resnet20 --data digits" if folder == "nowhere" else "")
]
MISUSED = [
    *FOLDERS,
    "hessian --nothing",
    "hessian --ckpt-dir full --method exakt",
    "hessian --ckpt-dir full --method split --tol 0.1",
    "hessian --ckpt-dir full --definition mine",
    "hessian --ckpt-dir full --operator mine",
    "hessian --ckpt-dir full --operator gauss-newton --top-k 2",
    "hessian --ckpt-dir full --engine mine",
    "hessian --ckpt-dir full --engine pyhessian --method exact",
    "hessian --ckpt-dir full --tol -1",
    "hessian --ckpt-dir full --top-k 5000",
    "hessian --ckpt-dir full --n-products 1",
    "hessian --ckpt-dir full --n-data 1",
    "hessian --ckpt-dir full --shard 3/2",
    "hessian --ckpt-dir full --jobs none",
    "hessian --ckpt-dir full --executor nowhere",
    "hessian --ckpt-dir full --loss mine",
    "hessian --ckpt-dir full --loss no_module:mine",
    "hessian --ckpt-dir full --model mine",
    "hessian --ckpt-dir full --model no_module:Net",
    "hessian --ckpt-dir full --data digits",
    "hessian --ckpt-dir full --model resnet20 --data digit",
    "hessian --ckpt-dir full --normalize half",
    "hessian --ckpt-dir full --model no_module:Net --data digits",
    "gradnorm --ckpt-dir full --definition mine",
    "gradnorm --ckpt-dir full --n-draws 1",
    "variance --ckpt-dir full --sd -1",
    "variance --ckpt-dir full --sd x",
    "noise --ckpt-dir full --sizes 0",
    "oscillation --ckpt-dir full --eps 2",
    "compare nowhere nowhere",
    "compare full full --definition mine",
    "figures 99",
    "figures 1 --ckpt-dir nowhere",
    "figures 1 --ckpt-dir empty",
    "figures 1 --ckpt-dir empty --no-measure",
    "report --ckpt-dir nowhere",
    "report --ckpt-dir empty",
    "tables --ckpt-dir nowhere",
    "tables --table 99",
    "watch nowhere",
    "watch full --probes mine",
    "doctor nowhere",
    "doctor empty",
    "inspect nowhere",
    "inspect empty",
    "export nowhere",
    "train --method mine",
    "train --method fpq",
    "train --method fpq --bits W4A4",
    "train --method fpq --bits W4A4 --init nowhere",
    "train --bits W4A4",
    "train --model mine",
    "train --epochs 0",
    "train --shard 1/2",
    "train --jobs 2",
    "train --config nowhere.toml",
    "train --config nowhere.toml --lr 3",
    "nothing",
]
HELP = ["--help", *(f"{command.name or command.callback.__name__} --help" for command in app.registered_commands)]


def answered(commands: list[str], heavy: str) -> list[list]:
    process = [sys.executable, "-c", CODE, heavy]
    result = subprocess.run(process, input=json.dumps(commands), capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_a_misused_command_answers_before_torch_is_loaded():
    Path("empty").mkdir()
    run = Path("full")
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "epoch_0000.pt").touch()
    for command, code, text, loaded in answered(MISUSED, "torch"):
        assert code in (1, 2), f"{command}: {text}"
        assert text.strip(), command
        assert "Traceback" not in text, command
        assert not loaded, f"{command} loads torch: {text}"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("hessian theirs", "given as --ckpt-dir FOLDER"),
        ("hessian --ckpt-dir theirs/a/ckpt_1.pth", "the folder is wanted that it is in: 'theirs/a'"),
        ("hessian --ckpt-dir full --sharpness --definition latent", "leave one of the two options out"),
        ("report theirs", "given as --ckpt-dir FOLDER"),
        ("figures 5 theirs", "given as --ckpt-dir FOLDER"),
        ("doctor --ckpt-dir theirs", "given without it: fpq-analyze doctor FOLDER"),
        ("compare --ckpt-dir theirs", "given without it: fpq-analyze compare FOLDER"),
        ("hessian --ckpt-dir theirs", "('a/ckpt_1.pth' and 1 more), which do not say of which network they are"),
        ("doctor theirs", "add --model package.module:factory --data NAME"),
        ("hessian --ckpt-dir empty", "holds no checkpoints (files that end in .pt, .pth, .safetensors)"),
        ("hessian --ckpt-dir theirs --model mynet.Net", "did you mean 'mynet:Net'?"),
    ],
)
def test_what_is_meant(command, says):
    for folder in ("empty", "theirs/a"):
        Path(folder).mkdir(parents=True)
    for name in ("ckpt_1.pth", "ckpt_2.pth"):
        Path("theirs/a", name).touch()
    result = CliRunner().invoke(app, command.split(), prog_name="fpq-analyze")
    assert result.exit_code in (1, 2)
    assert says in words(result.stderr.replace("│", " "))


def test_help_comes_before_anything_heavy():
    for command, code, _, loaded in answered(HELP, "torch,pandas,numpy,matplotlib,scipy,jinja2"):
        assert code == 0, command
        assert not loaded, command


@pytest.mark.parametrize(("names", "table"), [(choices.MODELS, MODELS), (choices.LOSSES, LOSSES)])
def test_names_are_those_of_what_there_is(names, table):
    assert list(names) == list(table)
