"""The trace of the Hessian: one public function, and the probe that runs it on a checkpoint.

A rising trace means that the loss grows faster, on average over directions, when the weights are moved: a sharper
minimum.  It scales with the weights' scale, so compare networks of one architecture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.curvature import (
    HessianOperator,
    MixedSamplesError,
    NotExactError,
    as_batches,
    certify,
    check_samples_apart,
    per_sample_traces,
)
from fpq_analysis.curvature.batches import Batch
from fpq_analysis.curvature.operator import Loss
from fpq_analysis.curvature.pyhessian_engine import pyhessian_trace_samples
from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.linalg import hutchinson
from fpq_analysis.models import model_device
from fpq_analysis.probes.point import Point, Rows
from fpq_analysis.quantizers import check_definition, clipped_fraction, fused_quantizers, latent_derivatives, variables
from fpq_analysis.quantizers import view as take_view

METHODS = ("auto", "exact", "sampled", "hutchinson", "pyhessian")
# Above this many classes `auto` draws labels: the exact sum then costs more than the error over the data is worth.
MAX_EXACT_CLASSES = 20
FIRST_LABELS = 4
FIRST_PROBES = 100
MAX_DRAWS = 100_000
ROOT = "(model)"  # the layer's name when the model is a single layer
PROBES_A_ROUND = 10  # probes that share a gradient graph, and the memory they take


@dataclass(frozen=True)
class TraceEstimate:
    """A trace with its errors and its definition.

    Attributes:
        value: estimate of Tr H of the mean loss over the given data.
        sem: standard error of `value` as an estimate for *these data*: from random probes or labels; 0 when exact.
        sem_data: standard error of `value` as an estimate for the distribution the data are a random sample of,
            random labels included; NaN for methods that do not see samples one by one.
        method: how it was measured; `reason`: why that method.
        definition: `dequantized`, `latent` or `float`, see `quantizers/views.py`.
        per_layer, per_layer_sem: the same by layer; they add up to `value` (their errors do not).
        per_sample: (n_data,) each sample's own trace, or None.
        n_data: number of samples.
        n_products: backward passes over the data (exact, sampled) or Hessian-vector products (the others).
        seed: of probes or labels.
        clipped_fraction: share of the quantized weights outside their grid.
        converged: False if `tol` was asked for and not reached.
    """

    value: float
    sem: float
    sem_data: float
    method: str
    reason: str
    definition: str
    per_layer: dict[str, float]
    per_layer_sem: dict[str, float]
    per_sample: np.ndarray | None = field(repr=False)
    n_data: int
    n_products: int
    seed: int
    clipped_fraction: float = 0.0
    converged: bool = True

    @property
    def error(self) -> float:
        """Standard error to quote: over the data where it is known, otherwise over the probes."""
        return self.sem if math.isnan(self.sem_data) else self.sem_data


def hessian_trace(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | Loss = "cross_entropy",
    method: str = "auto",
    definition: str = "dequantized",
    tol: float | None = None,
    n_probes: int = FIRST_PROBES,
    n_labels: int = FIRST_LABELS,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
) -> TraceEstimate:
    """Trace of the Hessian of the mean loss of a classifier with respect to its parameters.

    The model is measured as a copy in eval mode; the one handed over, its buffers, gradients and mode, and the global
    random state are untouched.  For a model quantized by `quantize`, step sizes are not variables.

    Args:
        model: any `nn.Module`; for the exact methods one that gives (N, C) logits.
        batches: a pair (inputs, targets) of tensors, or any iterable of such pairs.
        loss: `cross_entropy`, or a function (outputs, targets) to the *mean* over the batch.
        method: `exact` (`curvature/exact.py`), `sampled` (the same with drawn labels), `hutchinson`, `pyhessian` (as a
            cross-check), or `auto`: exact where a numeric certificate says that it holds, with drawn labels for more
            than 20 classes; Hutchinson elsewhere.
        definition: of a quantized network's Hessian: `dequantized`, `latent` or `float` (`quantizers/views.py`).
        tol: wanted `sem` relative to the value, for the random methods: probes or labels are doubled until it is
            reached.  None: `n_probes` probes or `n_labels` labels.
        seed: of the probes or labels.
        device: where to compute; None for where the model is.
        micro_batch: samples to hold at a time; None chooses by the size of an input.

    Raises:
        UserError: for a method that does not apply to the model, unknown names, or a result that is not finite.
    """
    _check_settings(method, definition, tol, n_probes, n_labels)
    where = torch.device(device) if device is not None else model_device(model)
    data = [(x.to(where), y.to(where)) for x, y in as_batches(batches, micro_batch)]
    view = take_view(model, definition).to(where)
    if not variables(view):
        raise UserError("The model has no trainable parameter, so its Hessian is empty.")

    function, cross_entropy = _loss(loss)
    _check_data(view, data, cross_entropy)
    asked, reason = method, "asked for"
    if asked in ("auto", "exact", "sampled"):
        try:
            if not cross_entropy:
                raise NotExactError("the loss is not the cross-entropy")
            if asked == "auto":
                method, reason = _exact_or_sampled(_n_classes(view, data))
            estimate = _by_sample(model, definition, data, method, n_labels, tol, seed)
        except NotExactError as outside:
            if asked != "auto":
                raise UserError(
                    f"The method '{asked}' does not hold here: {outside}. Use method='hutchinson', or 'auto'."
                ) from outside
            method, reason = "hutchinson", f"not exact: {outside}"
    if method in ("hutchinson", "pyhessian"):
        estimate = _by_probe(view, data, function, method, n_probes, tol, seed)
    if not math.isfinite(estimate["value"]):
        raise UserError(
            "The trace is not finite: the loss or a derivative overflowed on these data. Check the inputs for NaN and "
            "their normalisation, or measure in float64 (model.double(), inputs.double())."
        )
    return TraceEstimate(
        **estimate,
        method=method,
        reason=reason,
        definition=definition,
        n_data=sum(len(x) for x, _ in data),
        seed=seed,
        clipped_fraction=clipped_fraction(model),
    )


def _check_settings(method: str, definition: str, tol: float | None, n_probes: int, n_labels: int) -> None:
    if method not in METHODS:
        raise UserError(f"Unknown method '{method}'{did_you_mean(method, METHODS)}. Known: {', '.join(METHODS)}.")
    check_definition(definition)
    if tol is not None and not tol > 0:
        raise UserError(f"tol is {tol}, and must be above zero (0.01 for one per cent).")
    if min(n_probes, n_labels) < 2:
        raise UserError("An error needs at least 2 probes (n_probes) and 2 labels a sample (n_labels).")


def _loss(loss: str | Loss) -> tuple[Loss, bool]:
    """The loss as a function, and whether it is the cross-entropy."""
    if isinstance(loss, str):
        if loss != "cross_entropy":
            raise UserError(
                f"Unknown loss '{loss}'. Give 'cross_entropy', or a function (outputs, targets) to the mean."
            )
        return F.cross_entropy, True
    plain = isinstance(loss, nn.CrossEntropyLoss) and repr(loss.__dict__) == repr(nn.CrossEntropyLoss().__dict__)
    return loss, loss is F.cross_entropy or plain


def _check_data(view: nn.Module, data: list[Batch], cross_entropy: bool) -> None:
    """Raise `UserError` where the loss would not be the plain mean over samples that every method assumes."""
    try:
        check_samples_apart(view, data)
    except MixedSamplesError:
        raise UserError(
            "The model's output for one sample depends on the others of its batch, so its loss has no Hessian that is "
            "a mean over samples. Does it normalise over the batch, outside of a BatchNorm in eval mode?"
        ) from None
    if not cross_entropy:
        return
    with torch.no_grad():
        logits = view(data[0][0][:1])
    n_classes = logits.shape[1] if isinstance(logits, Tensor) and logits.ndim > 1 else 0
    for _, y in data:
        if y.is_floating_point() or y.ndim != logits.ndim - 1 or int(y.min()) < 0 or int(y.max()) >= n_classes:
            raise UserError(
                f"Cross-entropy here wants whole-number targets from 0 to C - 1 (C = {n_classes} outputs), one a "
                "sample. For soft or ignored targets give the loss as a function, loss=lambda outputs, targets: ..., "
                "that is a mean over the samples."
            )


def _exact_or_sampled(n_classes: int) -> tuple[str, str]:
    if n_classes > MAX_EXACT_CLASSES:
        return "sampled", f"{n_classes} classes: drawn labels are cheaper than the exact sum"
    return "exact", "the certificate holds: piecewise linear in every parameter"


def _by_sample(
    model: nn.Module, definition: str, data: list[Batch], method: str, n_labels: int, tol: float | None, seed: int
) -> dict[str, Any]:
    """The exact sum over classes, or drawn labels: both see each sample alone."""
    where = data[0][0].device
    derivatives = {}
    if definition == "latent":
        # Curvature in w is (dQ/dw)^2 times that in Q(w): Q acts on each weight alone and is piecewise linear.
        derivatives = {name: d.to(where) for name, d in latent_derivatives(model).items()}
        definition = "dequantized"
    view = take_view(model, definition).to(where)
    unchecked = certify(view, data, variables(view))
    draw = _sample_drawer(view, data, derivatives, method, seed)
    samples, converged = _until(draw, n_labels if method == "sampled" else 1, tol, _label_error)
    estimate = _estimate(samples, _label_error)
    for layer in unchecked:
        if estimate["per_layer"][layer or ROOT] != 0:
            raise NotExactError(f"'{layer}' had no effect on the images the certificate tried, but has on others")
    per_sample = torch.stack(list(samples.values())).sum(0).mean(0)
    n = len(per_sample)
    return {
        **estimate,
        "per_sample": per_sample.numpy(),
        # Each sample's mean over its labels already carries their noise.
        "sem_data": float(per_sample.std()) / math.sqrt(n) if n > 1 else math.nan,
        "n_products": _n_classes(view, data) - 1 if method == "exact" else len(next(iter(samples.values()))),
        "converged": converged,
    }


def _by_probe(
    view: nn.Module, data: list[Batch], loss: Loss, method: str, n_probes: int, tol: float | None, seed: int
) -> dict[str, Any]:
    """Random vectors: Hutchinson, ours or PyHessian's."""
    samples, converged = _until(_probe_drawer(view, data, loss, method, seed), n_probes, tol, _probe_error)
    estimate = _estimate(samples, _probe_error)
    if method == "pyhessian":
        estimate["per_layer"], estimate["per_layer_sem"] = {}, {}
    n_products = len(next(iter(samples.values())))
    return {**estimate, "per_sample": None, "sem_data": math.nan, "n_products": n_products, "converged": converged}


@torch.no_grad()
def _n_classes(view: nn.Module, data: list[Batch]) -> int:
    logits = view(data[0][0][:1])
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise NotExactError("the model's output is not one row of logits for each input")
    return logits.shape[1]


# Samples of a trace by parameter name: (draws,) for probes, (draws, N) for labels.
Samples = dict[str, Tensor]


def _until(
    draw: Callable[[int], Samples], first: int, tol: float | None, error: Callable[[Tensor], float]
) -> tuple[Samples, bool]:
    """Draw `first` samples, then as many again as there are, until the error is small enough.

    Doubling keeps the looks few: stopping at the first small error found by looking after every draw would stop early
    by chance.
    """
    samples = draw(first)
    while True:
        total = torch.stack(list(samples.values())).sum(0)
        value = abs(float(total.mean()))
        if tol is None or error(total) <= tol * value or not math.isfinite(value):
            return samples, True
        if 2 * len(total) > MAX_DRAWS:
            return samples, False
        more = draw(len(total))
        samples = {name: torch.cat([old, more[name]]) for name, old in samples.items()}


def _estimate(samples: Samples, error: Callable[[Tensor], float]) -> dict[str, Any]:
    layers: Samples = {}
    for name, draws in samples.items():
        layer = name.rpartition(".")[0] or ROOT
        layers[layer] = layers[layer] + draws if layer in layers else draws
    total = torch.stack(list(samples.values())).sum(0)
    return {
        "value": float(total.mean()),
        "sem": error(total),
        "per_layer": {layer: float(draws.mean()) for layer, draws in layers.items()},
        "per_layer_sem": {layer: error(draws) for layer, draws in layers.items()},
    }


def _label_error(draws: Tensor) -> float:
    """Standard error over the labels of the mean of (draws, N); 0 for a single row, which is exact."""
    m, n = draws.shape
    return 0.0 if m == 1 else math.sqrt(float(draws.var(0).sum()) / m) / n


def _probe_error(draws: Tensor) -> float:
    """Standard error of the mean of (draws,)."""
    return float(draws.std()) / math.sqrt(len(draws))


def _sample_drawer(
    view: nn.Module, data: list[Batch], derivatives: dict[str, Tensor], method: str, seed: int
) -> Callable[[int], Samples]:
    generator = torch.Generator(data[0][0].device).manual_seed(seed)

    def draw(n: int) -> Samples:
        labels = n if method == "sampled" else None
        with fused_quantizers(view):
            parts = list(
                per_sample_traces(
                    view, data, variables(view), n_labels=labels, generator=generator, derivatives=derivatives
                )
            )
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    return draw


def _probe_drawer(view: nn.Module, data: list[Batch], loss: Loss, method: str, seed: int) -> Callable[[int], Samples]:
    names = variables(view)
    if method == "pyhessian":
        seeds = itertools.count(seed)
        return lambda n: {"": pyhessian_trace_samples(view, loss, data, names, n, next(seeds))}
    operator = HessianOperator(view, loss, data, names)
    generator = torch.Generator(operator.device).manual_seed(seed)

    def draw(n: int) -> Samples:
        rounds = [min(PROBES_A_ROUND, n - i) for i in range(0, n, PROBES_A_ROUND)]
        blocks = list(operator.slices.values())
        parts = hutchinson(
            operator.matmat, operator.size, blocks, rounds=rounds, generator=generator, dtype=operator.dtype
        )
        columns = torch.cat(list(parts)).unbind(1)
        return dict(zip(names, columns, strict=True))

    return draw


@dataclass(frozen=True)
class HessianTrace:
    """The probe: `hessian_trace` on a checkpoint.

    Attributes: see `hessian_trace`.

    Raises:
        UserError: for settings that `hessian_trace` would refuse.
    """

    definition: str = "dequantized"
    method: str = "auto"
    tol: float | None = None
    n_probes: int = FIRST_PROBES
    n_labels: int = FIRST_LABELS

    name = "hessian_trace"
    version = 1  # part of a record's key: raise it when the numbers change

    def __post_init__(self) -> None:
        _check_settings(self.method, self.definition, self.tol, self.n_probes, self.n_labels)

    def __call__(self, point: Point) -> Rows:
        """Rows: the trace of every layer, the clipped fraction, and last the total."""
        estimate = hessian_trace(
            point.model,
            point.batches,
            loss=point.loss,
            method=self.method,
            definition=self.definition,
            tol=self.tol,
            n_probes=self.n_probes,
            n_labels=self.n_labels,
            seed=point.seed,
        )
        common = {
            "definition": estimate.definition,
            "estimator": estimate.method,
            "n_data": estimate.n_data,
            "n_products": estimate.n_products,
        }
        rows = [
            {"layer": layer, "quantity": "trace", "value": value, "sem": estimate.per_layer_sem[layer], **common}
            for layer, value in estimate.per_layer.items()
        ]
        rows.append({"layer": "all", "quantity": "clipped_fraction", "value": estimate.clipped_fraction, **common})
        total: dict[str, Any] = {"value": estimate.value, "sem": estimate.sem, "sem_data": estimate.sem_data}
        if estimate.per_sample is not None:
            total["samples"] = [float(f"{value:.7g}") for value in estimate.per_sample]
        status = "ok" if estimate.converged else "tolerance not reached"
        rows.append({"layer": "all", "quantity": "trace", "status": status, **total, **common})
        return rows
