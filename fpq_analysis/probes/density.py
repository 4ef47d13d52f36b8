"""The spectral density of the Hessian: how its eigenvalues are distributed, not only the extreme ones.

Typically a bulk around zero, a few outliers (about as many as classes), and a negative tail that shrinks in training.
Heavier weight away from zero means more directions of curvature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fpq_analysis.choices import check_definition, check_operator
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.memory import freed_memory_kept
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction
from fpq_analysis.linalg import SpectralMeasure, spectral_measure
from fpq_analysis.losses import LossFunction
from fpq_analysis.probes.point import Point, Rows
from fpq_analysis.probes.result import Result
from fpq_analysis.probes.subject import prepare
from fpq_analysis.progress import Progress
from fpq_analysis.ranks import same_on_all_ranks

N_DRAWS = 5
N_STEPS = 40


@dataclass(frozen=True, repr=False)
class DensityEstimate(Result, SpectralMeasure):
    """A spectral density with its definition.

    Attributes:
        nodes, weights: of every draw, (n_draws, n_steps) each; `density(grid, width)` and `moment(power)` are means.
        size: number of variables.
        definition: `dequantized`, `latent` or `float` (docs/definitions.md).
        operator: `hessian`, `gauss-newton` or `fisher`.
        n_data, n_products, seed: as in `TraceEstimate`.
    """

    definition: str
    operator: str
    n_data: int
    seed: int

    probe = "hessian_density"

    def rows(self) -> Rows:
        """`nodes_r` and `weights_r` of every draw r (in `samples`; `value`: largest node, number of nodes).

        The last two are the first moments, the trace and the sum of the squared eigenvalues.
        """
        common: dict[str, Any] = {
            "layer": "all",
            "definition": self.definition,
            "estimator": "slq" + ("" if self.operator == "hessian" else f", {self.operator}"),
            "n_data": self.n_data,
            "n_products": self.n_products,
        }
        rows: Rows = []
        for draw, (nodes, weights) in enumerate(zip(self.nodes, self.weights, strict=True), 1):
            rows.append({"quantity": f"nodes_{draw}", "value": float(nodes.max()), "samples": nodes.tolist(), **common})
            rows.append(
                {"quantity": f"weights_{draw}", "value": float(len(weights)), "samples": weights.tolist(), **common}
            )
        for quantity, power in (("size", 0), ("squares", 2), ("trace", 1)):
            value, sem = self.moment(power)
            rows.append({"quantity": quantity, "value": value, "sem": sem, **common})
        return rows

    def headline(self) -> Sequence[tuple[str, str]]:
        """See `Result`."""
        largest = float(self.nodes.max())
        return [("largest node", f"{largest:.4g}"), *super().headline()[-2:]]


@same_on_all_ranks
def spectral_density(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    n_draws: int = N_DRAWS,
    n_steps: int = N_STEPS,
    loss: str | LossFunction = "cross_entropy",
    definition: str = "dequantized",
    operator: str = "hessian",
    parameters: str | Iterable[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> DensityEstimate:
    """Spectral measure of the Hessian by stochastic Lanczos quadrature: `n_draws` times `n_steps` products.

    Args:
        model, batches, ...: as for `hessian_trace`.
        n_draws: random starting vectors, over which the density is averaged.
        n_steps: Lanczos steps from each, which decide the resolution.

    Returns:
        Nodes and weights, with `density(grid, width)` and `moment(power)`, each with its standard error.

    Raises:
        UserError: for names and numbers that make no sense, or a matrix that is not finite or not symmetric.
    """
    _check_settings(definition, operator, n_draws, n_steps)
    subject = prepare(
        model,
        batches,
        loss=loss,
        definition=definition,
        parameters=parameters,
        device=device,
        micro_batch=micro_batch,
        forward=forward,
    )
    matrix = subject.operator(operator, seed)
    generator = torch.Generator().manual_seed(seed)
    total = n_draws * min(n_steps, matrix.size)
    progress = Progress(total, HessianDensity.name, "products", subject.n_data)
    with progress, full_precision(), freed_memory_kept():  # the arithmetic between the products, too
        found = spectral_measure(matrix, generator=generator, n_draws=n_draws, n_steps=n_steps)
    return DensityEstimate(**vars(found), definition=definition, operator=operator, n_data=subject.n_data, seed=seed)


def _check_settings(definition: str, operator: str, n_draws: int, n_steps: int) -> None:
    check_definition(definition)
    check_operator(operator)
    if n_draws < 1 or n_steps < 2:
        raise UserError("A density needs at least one draw (n_draws; two for an error) of at least 2 steps (n_steps).")


@dataclass(frozen=True)
class HessianDensity:
    """The probe: `spectral_density` on a checkpoint.

    Attributes: see `spectral_density`.

    Raises:
        UserError: for settings that `spectral_density` would refuse.
    """

    definition: str = "dequantized"
    operator: str = "hessian"
    n_draws: int = N_DRAWS
    n_steps: int = N_STEPS

    name = "hessian_density"
    version = 2
    needs = ()

    def __post_init__(self) -> None:
        _check_settings(self.definition, self.operator, self.n_draws, self.n_steps)

    def __call__(self, point: Point) -> Rows:
        """Rows: see `DensityEstimate.rows`."""
        return spectral_density(point.model, point.batches, loss=point.loss, seed=point.seed, **asdict(self)).rows()
