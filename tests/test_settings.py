"""Settings are written once, in the fields of their dataclass: documentation, checks and options are made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest
import torch
import typer

from fpq_analysis import TrainConfig, UserError
from fpq_analysis.cli import app
from fpq_analysis.methods import METHODS, SCHEMES, load_class
from fpq_analysis.pipeline.task import Sampling
from fpq_analysis.plots.names import SPARE_COLOURS, SPARE_MARKERS
from fpq_analysis.quantizers import Quantizer
from fpq_analysis.quantizers.calibration import CALIBRATIONS
from fpq_analysis.settings import check_settings, documented, setting
from fpq_analysis.training.regularizer import Regularizer


@documented
@dataclass(frozen=True)
class Example:
    """An example."""

    kind: str = setting("a", "One of {choices}.", choices=("a", "b", "c"))
    other: str | None = setting(None, "{choices}.", choices=("x",))
    size: float = setting(1.0, "How large.", within="positive")
    share: float = setting(0.5, "Of all.", within="probability")


def test_a_field_documents_itself():
    assert "kind: One of a, b or c." in Example.__doc__
    assert "other: x." in Example.__doc__


def test_values_are_checked():
    check_settings(Example("c", "x", 1e-300, 1.0))
    wrong = ({"kind": "d"}, {"kind": None}, {"other": "y"}, {"size": 0.0}, {"size": float("nan")}, {"share": 1.5})
    for values in wrong:
        with pytest.raises(UserError, match=next(iter(values))):
            check_settings(Example(**values))


def test_every_field_of_a_run_is_an_option():
    command = typer.main.get_command(app).commands["train"]
    options = {option.name: option for option in command.params}
    for field in fields(TrainConfig):
        assert options[field.name].default == field.default
        assert options[field.name].opts == [f"--{field.name.replace('_', '-')}"]
        assert options[field.name].help == field.metadata["help"]


def test_what_the_catalogue_names_is_there():
    for method in METHODS.values():
        assert method.quantizer is None or method.quantizer in SCHEMES
        assert all(issubclass(load_class(place), Regularizer) for place in method.regularizers)
    for scheme in SCHEMES.values():
        assert issubclass(load_class(scheme.weight), Quantizer)
        assert issubclass(load_class(scheme.activation), Quantizer)
    for name in ("weight_calibration", "act_calibration"):
        assert set(TrainConfig.__dataclass_fields__[name].metadata["choices"]) == set(CALIBRATIONS)


def test_no_two_methods_share_a_colour_or_a_marker():
    colours = [*(method.colour for method in METHODS.values() if method.colour), *SPARE_COLOURS]
    markers = [*(method.marker for method in METHODS.values() if method.colour), *SPARE_MARKERS]
    assert len(set(colours)) == len(colours)
    assert len(set(markers)) == len(markers)
    assert math.lcm(len(SPARE_COLOURS), len(SPARE_MARKERS)) >= 30  # both go round


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": float("inf")}, "lr is inf, and must be a finite number"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0, and must be from 0 to below 1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"seed": 10**30}, "seed is 10+, and must fit into 64 bits"),
    ],
)
def test_no_training_with_numbers_that_are_none(options, says):
    with pytest.raises(UserError, match=says):
        TrainConfig(**options)


def test_no_measuring_with_a_seed_that_torch_does_not_take():
    with pytest.raises(UserError, match="must fit into 64 bits"):
        Sampling(seed=2**64)
    for seed in (-(2**63), 2**64 - 1):
        assert Sampling(seed=seed).seed == TrainConfig(seed=seed).seed == seed
        torch.Generator().manual_seed(seed)
