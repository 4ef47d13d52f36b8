"""From checkpoints to figures in one call, and again from the records alone."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from fpq_analysis import UserError, draw_figures
from fpq_analysis.cli import app
from fpq_analysis.plots import FIGURES
from fpq_analysis.probes import PROBES
from tests.words import words

FEW = {"n_data": 512, "device": "cpu", "model": "tests.nets:tiny"}


@pytest.fixture(scope="module")
def drawn(tiny_runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("figures")
    shutil.copytree(tiny_runs, root / "runs")
    rows = draw_figures(root / "runs", out=root / "out", log=lambda line: None, **FEW)
    return root, rows.set_index("figure")


def test_all_are_the_papers_and_what_was_measured(drawn):
    _, rows = drawn
    paper = [name for name in FIGURES if name.isdigit()]
    assert set(paper) <= set(rows.index)
    assert rows.loc[paper, "path"].notna().all()
    for path, note in zip(rows.loc[paper, "path"], rows.loc[paper, "note"], strict=True):
        assert {file.suffix for file in path.parent.glob(f"{path.stem}.*")} == {".png", ".pdf", ".txt"}
        assert "512" in note
    assert "eigenvalues" not in rows.index  # not of the paper, and not measured


def test_again_from_records_alone(drawn, tmp_path):
    root, rows = drawn
    for run in (root / "runs").iterdir():
        shutil.copytree(run / "records", tmp_path / "runs" / run.name / "records")
    code = (
        "import sys; from fpq_analysis.pipeline.figures import draw_figures; "
        f"found = draw_figures({str(tmp_path / 'runs')!r}, out={str(tmp_path / 'out')!r}, measure=False); "
        "sys.exit('torch' in sys.modules or bool(found['path'].isna().any()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
    for name, row in rows.iterrows():
        again = (tmp_path / "out" / row["path"].name).with_suffix(".png")
        assert again.read_bytes() == row["path"].read_bytes(), name


def test_every_drawing_has_a_probe_and_a_command_that_exists():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for drawing in FIGURES.values():
        assert drawing.command.split()[0] in commands
        assert drawing.probe in PROBES or drawing.probe in commands
    assert len({drawing.picture.file for drawing in FIGURES.values()}) == len(FIGURES)


def test_what_is_not_there_is_said(tiny_runs, tmp_path):
    with pytest.raises(UserError, match="did you mean 'density'"):
        draw_figures(tiny_runs, "densty")
    with pytest.raises(UserError, match="No folder"):
        draw_figures(tmp_path / "nowhere")
    rows = draw_figures(tmp_path, "5", measure=False, log=lambda line: None)
    assert rows["path"].isna().all()
    assert "fpq-analyze hessian" in rows["note"].item()


def test_the_command(drawn, tmp_path):
    root, _ = drawn
    arguments = ["figures", "5", "--ckpt-dir", str(root / "runs"), "--out", str(tmp_path), "--no-measure"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "figure5.png").exists()
    assert CliRunner().invoke(app, [*arguments[:1], "density", *arguments[2:]]).exit_code == 1


def test_the_command_takes_width_labels_and_runs(drawn, tmp_path):
    root, _ = drawn
    arguments = ["figures", "5", "--ckpt-dir", str(root / "runs"), "--out", str(tmp_path), "--no-measure"]
    more = ["--width", "1", "--label", "digits=CIFAR-10 (JPEG)", "--runs", "fp", "--runs", "lsq*"]
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "figure5.png") as picture:
        assert picture.width == 660  # 3.3 inches
    caption = (tmp_path / "figure5.txt").read_text()
    assert "CIFAR-10 (JPEG)" in caption
    assert "digits" not in caption
    shown = draw_figures(root / "runs", "5", tmp_path, measure=False, runs="fpq*", log=lambda line: None)
    assert shown["path"].notna().all()
    none = draw_figures(root / "runs", "5", tmp_path, measure=False, runs="nothing*", log=lambda line: None)
    assert "no run's name fits 'nothing*'; measured were fp, fpq-w4a4, lsq-w4a4" in none["note"].item()
    assert "says no name" in words(CliRunner().invoke(app, [*arguments, "--label", "digits"]).output)
    with pytest.raises(UserError, match="1 or 2 columns"):
        draw_figures(root / "runs", "5", tmp_path, measure=False, columns=3, log=lambda line: None)
