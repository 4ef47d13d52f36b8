"""The spectral density of the Hessian: how its eigenvalues are distributed, not only the extreme ones.

Typically a bulk around zero, a few outliers (about as many as classes), and a negative tail that shrinks in training.
Heavier weight away from zero means more directions of curvature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.errors import UserError
from fpq_analysis.linalg import SpectralMeasure, spectral_measure
from fpq_analysis.losses import Loss
from fpq_analysis.probes.point import Point, Rows
from fpq_analysis.probes.subject import check_operator, prepare
from fpq_analysis.quantizers import check_definition

RUNS = 5
STEPS = 40


def spectral_density(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    runs: int = RUNS,
    steps: int = STEPS,
    loss: str | Loss = "cross_entropy",
    definition: str = "dequantized",
    operator: str = "hessian",
    parameters: str | Iterable[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
) -> SpectralMeasure:
    """Spectral measure of the Hessian by stochastic Lanczos quadrature; one product a run and step.

    Args:
        model, batches, ...: as for `hessian_trace`.
        runs: random starting vectors, over which the density is averaged.
        steps: of Lanczos: the resolution.

    Returns:
        Nodes and weights, with `density(grid, width)` and `moment(power)`, each with its standard error.

    Raises:
        UserError: for names and numbers that make no sense, or a matrix that is not finite or not symmetric.
    """
    _check_settings(definition, operator, runs, steps)
    subject = prepare(
        model, batches, loss=loss, definition=definition, parameters=parameters, device=device, micro_batch=micro_batch
    )
    matrix = subject.operator(operator, seed)
    generator = torch.Generator().manual_seed(seed)
    with full_precision():  # the arithmetic between the products, too
        return spectral_measure(matrix, generator=generator, runs=runs, steps=steps)


def _check_settings(definition: str, operator: str, runs: int, steps: int) -> None:
    check_definition(definition)
    check_operator(operator)
    if runs < 1 or steps < 2:
        raise UserError("A density needs at least one run (two for an error), of at least 2 steps.")


@dataclass(frozen=True)
class HessianDensity:
    """The probe: `spectral_density` on a checkpoint.

    Attributes: see `spectral_density`.

    Raises:
        UserError: for settings that `spectral_density` would refuse.
    """

    definition: str = "dequantized"
    operator: str = "hessian"
    runs: int = RUNS
    steps: int = STEPS

    name = "hessian_density"
    version = 2
    needs = ()

    def __post_init__(self) -> None:
        _check_settings(self.definition, self.operator, self.runs, self.steps)

    def __call__(self, point: Point) -> Rows:
        """Rows: `nodes_r` and `weights_r` of every run r (in `samples`; `value`: largest node, number of nodes).

        The last two are the first moments, the trace and the sum of the squared eigenvalues.
        """
        measure = spectral_density(
            point.model,
            point.batches,
            runs=self.runs,
            steps=self.steps,
            loss=point.loss,
            definition=self.definition,
            operator=self.operator,
            seed=point.seed,
        )
        common: dict[str, Any] = {
            "layer": "all",
            "definition": self.definition,
            "estimator": "slq" + ("" if self.operator == "hessian" else f", {self.operator}"),
            "n_data": len(point.batches[0]),
            "n_products": measure.n_products,
        }
        rows: Rows = []
        for run, (nodes, weights) in enumerate(zip(measure.nodes, measure.weights, strict=True), 1):
            rows.append({"quantity": f"nodes_{run}", "value": float(nodes.max()), "samples": nodes.tolist(), **common})
            rows.append(
                {"quantity": f"weights_{run}", "value": float(len(weights)), "samples": weights.tolist(), **common}
            )
        for quantity, power in (("size", 0), ("squares", 2), ("trace", 1)):
            value, sem = measure.moment(power)
            rows.append({"quantity": quantity, "value": value, "sem": sem, **common})
        return rows
