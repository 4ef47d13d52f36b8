"""Every result prints in a few lines, is a table of records and draws itself; its rows are those of its probe."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

import fpq_analysis as fpq
from fpq_analysis.plots.style import rendered
from fpq_analysis.probes import PROBES, Point
from fpq_analysis.probes.result import Result
from fpq_analysis.records.table import COLUMNS, NUMBERS
from tests.nets import tiny

torch.manual_seed(0)
FLOAT = tiny().eval()
IMAGES = torch.randn(12, 1, 8, 8), torch.randint(10, (12,))
MODEL = fpq.quantize(FLOAT, fpq.QuantSpec.parse("W4A4")).eval()
fpq.calibrate(MODEL, IMAGES[0], "mse")
BEFORE = copy.deepcopy(MODEL)
with torch.no_grad():
    for parameter in BEFORE.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape))
SEED = 3
MEASURED = {
    "hessian_trace": lambda: fpq.hessian_trace(MODEL, IMAGES, seed=SEED),
    "gauss_newton_trace": lambda: fpq.hessian_trace(MODEL, IMAGES, seed=SEED, operator="gauss-newton"),
    "hessian_eigs": lambda: fpq.hessian_eigs(MODEL, IMAGES, seed=SEED),
    "hessian_density": lambda: fpq.spectral_density(MODEL, IMAGES, seed=SEED),
    "sharpness": lambda: fpq.sharpness(MODEL, IMAGES, seed=SEED),
    "gradnorm": lambda: fpq.gradient_norms(MODEL, IMAGES, seed=SEED),
    "output_variance": lambda: fpq.output_variance(MODEL, IMAGES, seed=SEED),
    "features": lambda: fpq.feature_statistics(MODEL, IMAGES, seed=SEED),
    "drift": lambda: fpq.feature_drift(MODEL, FLOAT, IMAGES, seed=SEED),
    "noise": lambda: fpq.noise_response(MODEL, IMAGES, seed=SEED),
    "oscillation": lambda: fpq.oscillation(MODEL, BEFORE),
    "landscape": lambda: fpq.landscape(MODEL, IMAGES, points=5, seed=SEED),
}
_cache: dict[str, Result] = {}


def measured(name: str) -> Result:
    if name not in _cache:
        _cache[name] = MEASURED[name]()
    return _cache[name]


@pytest.fixture(params=MEASURED)
def result(request):
    return measured(request.param)


def test_every_probe_has_a_public_function():
    assert set(PROBES) <= set(MEASURED)


def test_every_class_of_results_is_among_them():
    found = {type(measured(name)) for name in MEASURED}
    assert set(Result.__subclasses__()) == found


def test_it_prints_in_a_few_short_lines(result):
    lines = repr(result).splitlines()
    assert 2 <= len(lines) <= 11
    assert max(map(len, lines)) <= 80
    seed = () if result.probe == "oscillation" else (f"seed {result.seed}",)
    for about in (type(result).__name__, result.probe, *seed):
        assert about in " ".join(repr(result).split())


def test_its_table_is_one_of_records(result):
    frame = result.frame("mine")
    assert list(frame.columns[: len(COLUMNS)]) == list(COLUMNS)
    assert all(frame[column].dtype == float for column in NUMBERS)
    assert set(frame["probe"]) == {result.probe}
    assert set(frame["run"]) == {"mine"}
    assert not frame.duplicated(["layer", "quantity"]).any()
    assert frame["value"].notna().all()
    assert frame["layer"].iloc[-1] == "all"


def test_it_draws_itself(result):
    figure = result.plot()
    assert isinstance(figure, Figure)
    assert figure.axes
    assert len(rendered(figure, "png")) > 5000
    assert not any("epoch" in text.get_text() for text in figure.findobj(Text))


def test_its_rows_are_those_that_its_probe_records(result):
    if result.probe not in PROBES:
        return  # a landscape is measured in pieces
    point = Point(MODEL, IMAGES, seed=SEED, teacher=FLOAT, previous=BEFORE)
    rows = pd.DataFrame(PROBES[result.probe]()(point))
    mine = pd.DataFrame(result.rows())
    assert rows[["layer", "quantity"]].equals(mine[["layer", "quantity"]])
    np.testing.assert_array_equal(rows["value"].astype(float), mine["value"].astype(float))


def test_a_number_is_had_by_its_name():
    row = fpq.sharpness(MODEL, IMAGES, seed=SEED)["average_case"]
    assert row["layer"] == "all"
    with pytest.raises(KeyError):
        fpq.oscillation(MODEL, BEFORE)["nothing"]


def test_what_the_operator_is_stands_in_print():
    assert "gauss-newton" in repr(fpq.hessian_trace(FLOAT, IMAGES, operator="gauss-newton"))
    assert "latent" in repr(fpq.hessian_trace(MODEL, IMAGES, definition="latent"))


def test_a_tolerance_that_is_missed_is_said():
    assert "tolerance not reached" in repr(fpq.hessian_eigs(FLOAT, IMAGES, 2, tol=1e-9, n_products=3))
