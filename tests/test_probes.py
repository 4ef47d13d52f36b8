"""Every probe keeps the same promises; a new one is held to them by being in the table."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fpq_analysis import QuantSpec, UserError, calibrate, quantize
from fpq_analysis.cli import app
from fpq_analysis.cli.options import numbers
from fpq_analysis.measures import MEASURES, NoSettings
from fpq_analysis.methods import load_class
from fpq_analysis.plots import FIGURES
from fpq_analysis.probes import PROBES, Point
from fpq_analysis.records import COLUMNS
from tests.nets import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def point():
    torch.manual_seed(0)
    teacher = tiny().eval()
    model = quantize(teacher, QuantSpec.parse("W4A4"))
    x, y = torch.randn(12, 1, 8, 8), torch.randint(10, (12,))
    calibrate(model, x, "mse")
    previous = copy.deepcopy(model)
    with torch.no_grad():
        for p in previous.parameters():
            p.mul_(1.02)
    return Point(model.eval(), (x, y), seed=3, teacher=teacher, previous=previous.eval())


@pytest.mark.parametrize("probe", [kind() for kind in PROBES.values()], ids=list(PROBES))
class TestEveryProbe:
    def test_rows_fit_the_table(self, probe, point):
        rows = probe(point)
        assert all(set(row) <= set(COLUMNS) for row in rows)
        assert rows[-1]["layer"] == "all"
        assert all(isinstance(row["value"], float) for row in rows)

    def test_same_seed_same_rows(self, probe, point):
        assert repr(probe(point)) == repr(probe(point))

    def test_nothing_is_left_changed(self, probe, point):
        state = {k: v.clone() for k, v in point.model.state_dict().items()}
        rng = torch.random.get_rng_state()
        probe(point)
        assert all(torch.equal(v, point.model.state_dict()[k]) for k, v in state.items())
        assert torch.equal(rng, torch.random.get_rng_state())
        assert not point.model.training
        assert all(p.grad is None and p.requires_grad for p in point.model.parameters())

    def test_settings_are_frozen_and_versioned(self, probe, point):
        assert dataclasses.is_dataclass(probe)
        assert probe.__dataclass_params__.frozen
        assert probe.version >= 1
        assert PROBES[probe.name] is type(probe)


@pytest.mark.parametrize("name", MEASURES)
class TestEveryMeasure:
    def test_its_settings_are_the_probe_s_fields(self, name):
        row = MEASURES[name]
        if row.help:
            assert issubclass(PROBES[name], row.settings) or row.settings is NoSettings
            assert [f.name for f in dataclasses.fields(PROBES[name])] == [
                f.name for f in dataclasses.fields(row.settings)
            ]

    def test_its_command_and_its_page_are_there(self, name):
        row = MEASURES[name]
        assert (ROOT / "docs" / f"{row.page}.md").exists() or row.page == "extending"
        result = CliRunner().invoke(app, [*row.command.split()[:1], "--help"], env={"COLUMNS": "80"})
        assert result.exit_code == 0
        for one in dataclasses.fields(row.settings):
            assert f"--{one.name.replace('_', '-')}" in result.output
        assert max(map(len, result.output.splitlines())) <= 80

    def test_what_it_shows_is_there(self, name):
        row = MEASURES[name]
        assert row.show is None or callable(load_class(f"fpq_analysis.cli.shown:{row.show}"))
        assert {picture.key for picture in row.pictures} == {k for k, d in FIGURES.items() if d.probe == name}


def test_numbers_of_an_option_are_given_with_commas_or_one_by_one():
    assert numbers("sds", ["0.1,0.2", "0.5"]) == (0.1, 0.2, 0.5)
    with pytest.raises(UserError, match="are no sds"):
        numbers("sds", ["0.1,x"])
