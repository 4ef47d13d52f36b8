"""Every probe keeps the same promises; a new one is held to them by being in the table."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from fpq_analysis import QuantSpec, calibrate, quantize
from fpq_analysis.probes import PROBES, Point
from fpq_analysis.records import COLUMNS
from tests.nets import tiny


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
