"""Extreme eigenvalues of the Hessian: the sharpest directions, and how far it is from being positive.

The largest eigenvalue bounds the step a gradient method may take (2 / lambda for plain gradient descent); negative ones
are directions of escape.  A rising one means a sharper minimum in its worst direction, where the trace speaks of the
average one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fpq_analysis.choices import MOST_PRODUCTS, check_definition, check_k, check_operator
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.memory import freed_memory_kept
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction
from fpq_analysis.linalg import eigenpairs
from fpq_analysis.linalg.eigs import check_which
from fpq_analysis.losses import LossFunction
from fpq_analysis.probes.point import Point, Rows
from fpq_analysis.probes.result import MOST, Result
from fpq_analysis.probes.subject import prepare
from fpq_analysis.progress import Progress
from fpq_analysis.quantizers import clipped_fraction
from fpq_analysis.ranks import same_on_all_ranks


@dataclass(frozen=True, repr=False)
class EigenEstimate(Result):
    """Eigenvalues with their residuals and their definition.

    Attributes:
        values: (k,), the wanted end first.
        residuals: (k,) `|H v - value v|`: there is an eigenvalue within it of each value (not a statistical error).
        converged: (k,) whether the residual is within the tolerance.
        vectors: by parameter name, `(k, *its shape)`, or None; together each eigenvector has length 1.
        definition: `dequantized`, `latent` or `float` (docs/definitions.md).
        operator: `hessian`, `gauss-newton` or `fisher`.
        which: `LA`, `SA` or `LM`.
        n_data, n_products, seed, clipped_fraction: as in `TraceEstimate`.
        start: (n,) hand it to the next call for a warm start.
    """

    values: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    vectors: dict[str, Tensor] | None
    definition: str
    operator: str
    which: str
    n_data: int
    n_products: int
    seed: int
    clipped_fraction: float
    start: Tensor

    probe = "hessian_eigs"

    def rows(self) -> Rows:
        """`eigenvalue_1` ... `eigenvalue_k`; `sem` is 0, the residual stands in rows of its own."""
        common: dict[str, Any] = {
            "layer": "all",
            "definition": self.definition,
            "estimator": f"lanczos {self.which}" + ("" if self.operator == "hessian" else f", {self.operator}"),
            "n_data": self.n_data,
            "n_products": self.n_products,
        }
        rows: Rows = []
        if not math.isnan(self.clipped_fraction):
            rows.append({"quantity": "clipped_fraction", "value": self.clipped_fraction, **common})
        for i, (value, residual, converged) in enumerate(
            zip(self.values, self.residuals, self.converged, strict=True), 1
        ):
            rows.append({"quantity": f"residual_{i}", "value": float(residual), **common})
            status = "ok" if converged else "tolerance not reached"
            rows.append({"quantity": f"eigenvalue_{i}", "value": float(value), "sem": 0.0, "status": status, **common})
        return rows

    def headline(self) -> Sequence[tuple[str, str]]:
        """See `Result`."""
        found = zip(self.values, self.residuals, self.converged, strict=True)
        return [
            (f"eigenvalue_{i}", f"{x:.5g} ± {r:.2g} (residual{'' if good else '; tolerance not reached'})")
            for i, (x, r, good) in enumerate(found, 1)
        ][:MOST]


@same_on_all_ranks
def hessian_eigs(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    k: int = 5,
    *,
    which: str = "LA",
    loss: str | LossFunction = "cross_entropy",
    definition: str = "dequantized",
    operator: str = "hessian",
    parameters: str | Iterable[str] | None = None,
    tol: float = 1e-3,
    start: Tensor | None = None,
    eigenvectors: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
    n_products: int = MOST_PRODUCTS,
) -> EigenEstimate:
    """The k largest, smallest, or largest-in-magnitude eigenvalues of the Hessian of the mean loss.

    The model is measured as for `hessian_trace`.

    Args:
        model, batches, loss, definition, operator, parameters, seed: as for `hessian_trace`.
        which: `LA` (largest), `SA` (smallest), `LM` (largest in magnitude).
        tol: a pair has converged when `|H v - value v|` is within `tol` times `|value|`.
        start: `start` of an earlier estimate, of this network at an epoch nearby: fewer products, the same values.
        eigenvectors: return them.
        n_products: the most products to make; pairs that have not converged by then are returned as such.
        device, micro_batch, forward: as for `hessian_trace`.

    Raises:
        UserError: for names and numbers that make no sense, or a matrix that is not finite or not symmetric.
    """
    _check_settings(k, which, definition, operator, tol, n_products)
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
    if start is not None and len(start) != matrix.size:
        raise UserError(f"The warm start has {len(start):,} rows and the model {matrix.size:,} variables.")
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(None, HessianEigs.name, "products", subject.n_data)
    with progress, full_precision(), freed_memory_kept():  # the arithmetic between the products, too
        found = eigenpairs(matrix, k, which=which, tol=tol, generator=generator, start=start, n_products=n_products)
    vectors = None
    if eigenvectors:
        shapes = {name: p.shape for name, p in subject.parameters.items()}
        vectors = {name: found.vectors[:, place].reshape(-1, *shapes[name]) for name, place in matrix.slices.items()}
    return EigenEstimate(
        found.values.numpy(),
        found.residuals.numpy(),
        found.converged.numpy(),
        vectors,
        definition,
        operator,
        which,
        subject.n_data,
        matrix.n_products,
        seed,
        math.nan if subject.foreign else clipped_fraction(subject.model),
        found.start,
    )


def _check_settings(
    k: int, which: str, definition: str, operator: str, tol: float, n_products: int = MOST_PRODUCTS
) -> None:
    check_which(which)
    check_definition(definition)
    check_operator(operator)
    check_k(k, n_products)
    if not 0 < tol < 1:
        raise UserError(f"tol is {tol}, and must be between 0 and 1 (0.001 for a relative residual of 0.1 %).")


@dataclass(frozen=True)
class HessianEigs:
    """The probe: `hessian_eigs` on a checkpoint.

    Not started from the checkpoint before, which would save a tenth of the products: a record depends on its key alone,
    whatever was measured before it, and where.

    Attributes: see `hessian_eigs`.

    Raises:
        UserError: for settings that `hessian_eigs` would refuse.
    """

    definition: str = "dequantized"
    k: int = 5
    which: str = "LA"
    operator: str = "hessian"
    tol: float = 1e-3

    name = "hessian_eigs"
    version = 2
    needs = ()

    def __post_init__(self) -> None:
        _check_settings(self.k, self.which, self.definition, self.operator, self.tol)

    def __call__(self, point: Point) -> Rows:
        """Rows: see `EigenEstimate.rows`."""
        return hessian_eigs(point.model, point.batches, loss=point.loss, seed=point.seed, **asdict(self)).rows()
