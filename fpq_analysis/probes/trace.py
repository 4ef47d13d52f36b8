"""The trace of the Hessian: one public function, and the probe that runs it on a checkpoint.

A rising trace means that the loss grows faster, on average over directions, when the weights are moved: a sharper
minimum.  It scales with the weights' scale, so compare networks of one architecture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fpq_analysis.choices import BY_SAMPLE, N_LABELS, N_PRODUCTS, check_trace
from fpq_analysis.curvature import NotExactError, SampleTraces, as_batches
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.memory import freed_memory_kept
from fpq_analysis.curvature.operator import CurvatureOperator
from fpq_analysis.curvature.pyhessian_engine import pyhessian_trace_samples
from fpq_analysis.curvature.sampling import ALL, layer_blocks
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction
from fpq_analysis.intervals import half_interval
from fpq_analysis.linalg import Estimate, Lanczos, Sketch, deflated_hutchinson, hutchinson, xnystrace, xtrace
from fpq_analysis.losses import LossFunction
from fpq_analysis.probes.point import Point, Rows, stored
from fpq_analysis.probes.result import Result
from fpq_analysis.probes.sample_traces import by_sample
from fpq_analysis.probes.split_trace import split_trace
from fpq_analysis.probes.subject import Subject, check_finite, prepare
from fpq_analysis.progress import Progress
from fpq_analysis.quantizers import clipped_fraction
from fpq_analysis.ranks import same_on_all_ranks
from fpq_analysis.records.queries import ABOVE_GUESSING, AT_CHANCE

MAX_PRODUCTS = 100_000
ROOT = "(model)"  # the layer's name when the model is a single layer


@dataclass(frozen=True, repr=False)
class TraceEstimate(Result):
    """A trace with its errors and its definition.

    Attributes:
        value: estimate of Tr H of the mean loss over the given data.
        sem: standard error of `value` as an estimate for *these data*: from random probes, labels, or the choice of
            samples; 0 when exact.
        sem_data: standard error of `value` as an estimate for the distribution the data are a random sample of,
            random labels included; NaN for methods that do not see samples one by one.
        dof: degrees of freedom of the error to quote, for Student's t.
        method: how it was measured; `reason`: why that method.
        definition: `dequantized`, `latent` or `float` (docs/definitions.md).
        per_layer, per_layer_sem: the same by layer; they add up to `value` (their errors do not).
        per_sample: each sample's own trace, (n_data,), or None.
        samples: what `value` is the mean of: `per_sample`, or single probes.
        loss, accuracy: of the model of this definition on these data (of more than 4,096 samples, on some spread over
            them); NaN where targets are no class numbers.
        at_chance: whether the accuracy is no better than that of always naming the most frequent class.
        above_guessing: whether the cross-entropy is higher than that of always giving the classes' frequencies.
        n_data: number of samples measured on.
        n_products: backward passes over them (exact, sampled) or matrix-vector products (the others).
        seed: of probes or labels.
        clipped_fraction: share of the quantized weights outside their grid.
        converged: False if `tol` was asked for and not reached.
        operator: `hessian`, `gauss-newton` or `fisher`.
    """

    value: float
    sem: float
    sem_data: float
    dof: float
    method: str
    reason: str
    definition: str
    per_layer: dict[str, float]
    per_layer_sem: dict[str, float]
    per_sample: np.ndarray | None
    samples: np.ndarray
    n_data: int
    n_products: int
    seed: int
    clipped_fraction: float = 0.0
    converged: bool = True
    loss: float = math.nan
    accuracy: float = math.nan
    at_chance: bool = False
    above_guessing: bool = False
    operator: str = "hessian"

    probe = "hessian_trace"

    def rows(self) -> Rows:
        """The trace of every layer, the clipped fraction, loss and accuracy, and last the total."""
        common = {
            "definition": self.definition,
            "estimator": self.method + ("" if self.operator == "hessian" else f", {self.operator}"),
            "n_data": self.n_data,
            "n_products": self.n_products,
        }
        rows: Rows = [
            {"layer": layer, "quantity": "trace", "value": value, "sem": self.per_layer_sem[layer], **common}
            for layer, value in self.per_layer.items()
        ]
        whole: dict[str, Any] = {"layer": "all", **common}
        if not math.isnan(self.clipped_fraction):
            rows.append({"quantity": "clipped_fraction", "value": self.clipped_fraction, **whole})
        status = ABOVE_GUESSING if self.above_guessing else "ok"
        rows.append({"quantity": "loss", "value": self.loss, "status": status, **whole})
        if not math.isnan(self.accuracy):
            status = AT_CHANCE if self.at_chance else "ok"
            rows.append({"quantity": "accuracy", "value": self.accuracy, "status": status, **whole})
        total: dict[str, Any] = {"value": self.value, "sem": self.sem, "sem_data": self.sem_data}
        if self.per_sample is not None:
            total["samples"] = stored(self.per_sample)
        status = "ok" if self.converged else "tolerance not reached"
        rows.append({"layer": "all", "quantity": "trace", "ci95": self.ci95, "status": status, **total, **common})
        return rows

    @property
    def error(self) -> float:
        """Standard error to quote: over the data where it is known, otherwise over the probes."""
        return self.sem if math.isnan(self.sem_data) else self.sem_data

    @property
    def ci95(self) -> float:
        """Half of the two-sided 95 % interval that belongs to `error`."""
        return half_interval(self.error, self.dof)


@same_on_all_ranks
def hessian_trace(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | LossFunction = "cross_entropy",
    method: str = "auto",
    definition: str = "dequantized",
    operator: str = "hessian",
    parameters: str | Iterable[str] | None = None,
    tol: float | None = None,
    n_products: int = N_PRODUCTS,
    n_labels: int = N_LABELS,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> TraceEstimate:
    """Trace of the Hessian of the mean loss with respect to its parameters.

    The model is measured as a copy in eval mode; the one handed over, its buffers, gradients and mode, and the global
    random state are untouched.  For a model quantized by `quantize`, step sizes are not variables.

    Methods that see samples one by one, for a loss with an `output_factor` and piecewise linear networks; or, with
    `operator="gauss-newton"`, any network, as nothing is differentiated twice:

    - `exact`: no random number (`curvature/exact.py`);
    - `sampled`: drawn labels; with `tol`, drawn samples too (`curvature/sampling.py`).

    Methods of matrix-vector products, for any network and loss:

    - `hutchinson`: random signs; `deflated`: with a Krylov subspace taken out exactly; `hutch++`: with a sketch;
    - `xtrace`; `xnystrace` for positive semidefinite matrices (`operator="gauss-newton"`, `"fisher"`);
    - `split`: of the Hessian, the Gauss-Newton matrix's trace by sample, and of what is left random signs, among those
      parameters alone in which the outputs are not piecewise linear; for a loss with an `output_factor`;
    - `pyhessian`: its Hutchinson, as a cross-check.

    `auto` takes `exact` where the autograd graph proves that it holds (`sampled` with `tol`, or where a sample has more
    than 19 columns of the factor: 20 classes, of one position), and `deflated` elsewhere.

    Args:
        model: any `nn.Module`.
        batches: a pair (inputs, targets), or any iterable of such pairs (docs/data.md).
        loss: a name of `LOSSES`, a `Loss`, PyTorch's loss, or a function (outputs, targets) to the *mean* over the
            batch (docs/losses.md).
        method: one of those above.
        definition: of a quantized network's Hessian: `dequantized`, `latent` or `float` (docs/definitions.md).
        operator: `hessian`, `gauss-newton`, or `fisher` (one label a sample, drawn by `seed`).
        parameters: name patterns of the variables, as `layer3.*`; None for all.  Parameters that want no gradient are
            constants, as in training; of a checkpoint, whose file does not say, it is the factory that freezes them.
        tol: wanted `sem` relative to the value; as much is drawn as it takes.  None: `n_labels` labels a sample, or
            `n_products` products.
        n_products, n_labels: matrix-vector products, and labels a sample, without `tol`.
        seed: of the probes, labels and samples drawn.
        device: where to compute; None for where the model is.
        micro_batch: samples to hold at a time; None chooses by the size of an input.
        forward: how the model is called, a function (model, inputs) to its outputs; None: as docs/data.md says.

    Raises:
        UserError: for a method that does not apply to the model, unknown names, or a result that is not finite.
    """
    check_trace(method, definition, operator, tol, n_products, n_labels)
    where: dict[str, Any] = {
        "loss": loss,
        "parameters": parameters,
        "device": device,
        "micro_batch": micro_batch,
        "forward": forward,
    }
    batches = as_batches(batches, micro_batch)  # an iterator can be gone through once
    subject = prepare(model, batches, definition=definition, **where)
    model = subject.model
    estimate, reason = None, "asked for"
    plain = functools.partial(prepare, model, batches, **where)
    if method == "split":
        try:
            estimate = split_trace(subject, plain, definition, n_products, n_labels, seed)
        except NotExactError as outside:
            raise UserError(f"The method 'split' does not hold here: {outside}. Use method='deflated'.") from outside
        for kind in ("per_layer", "per_layer_sem"):
            estimate[kind] = {layer or ROOT: number for layer, number in estimate[kind].items()}
    if method == "auto" or method in BY_SAMPLE:
        try:
            traces, method, reason = by_sample(subject, plain, definition, operator, method, n_labels, tol, seed)
            estimate = _from_samples(traces)
        except NotExactError as outside:
            if method != "auto":
                known = operator == "hessian" and subject.loss.output_factor is not None
                other = "; or operator='gauss-newton', whose trace needs no such condition" if known else ""
                raise UserError(
                    f"The method '{method}' does not hold here: {outside}. Use method='deflated', or 'auto'{other}."
                ) from outside
            method, reason = "deflated", f"not exact: {outside}"
    if estimate is None:
        estimate = _from_products(subject, operator, method, n_products, tol, seed)
    check_finite(estimate["value"], "trace")
    return TraceEstimate(
        **estimate,
        method=method,
        reason=reason,
        definition=definition,
        seed=seed,
        clipped_fraction=math.nan if subject.foreign else clipped_fraction(model),
        loss=subject.fit.loss,
        accuracy=subject.fit.accuracy,
        at_chance=subject.fit.at_chance,
        above_guessing=subject.fit.above_guessing,
        operator=operator,
    )


def _from_samples(traces: SampleTraces) -> dict[str, Any]:
    layers = [layer for layer in traces.traces if layer != ALL]
    return {
        "value": traces.value(),
        "sem": traces.sem(),
        "sem_data": traces.sem_data(),
        "dof": max(1, traces.n - 1),
        "per_layer": {layer or ROOT: traces.value(layer) for layer in layers},
        "per_layer_sem": {layer or ROOT: traces.sem(layer) for layer in layers},
        "per_sample": traces.traces[ALL].numpy(),
        "samples": traces.traces[ALL].numpy(),
        "n_data": traces.n,
        "n_products": traces.n_passes,
    }


def _from_products(
    subject: Subject, operator: str, method: str, n_products: int, tol: float | None, seed: int
) -> dict[str, Any]:
    blocks: dict[str, slice] = {}
    if method == "pyhessian":
        found = _pyhessian(subject, n_products, tol, seed)
    else:
        matrix = subject.operator(operator, seed)
        blocks = layer_blocks(matrix.slices)
        progress = Progress(None if tol else n_products, HessianTrace.name, "products", subject.n_data)
        with progress, full_precision(), freed_memory_kept():  # the arithmetic between the products, too
            found = _estimate(matrix, method, list(blocks.values()), n_products, tol, seed)
    return {
        "value": found.value,
        "sem": found.sem,
        "sem_data": math.nan,
        "dof": found.dof,
        "per_layer": {layer or ROOT: float(x) for layer, x in zip(blocks, found.blocks, strict=False)},
        "per_layer_sem": {layer or ROOT: float(x) for layer, x in zip(blocks, found.block_sems, strict=False)},
        "per_sample": None,
        "samples": found.samples.numpy(),
        "n_data": subject.n_data,
        "n_products": found.n_products,
        "converged": found.converged,
    }


def _estimate(
    matrix: CurvatureOperator, method: str, blocks: list[slice], n_products: int, tol: float | None, seed: int
) -> Estimate:
    generator = torch.Generator(matrix.device).manual_seed(seed)
    common: dict[str, Any] = {"generator": generator, "tol": tol, "max_products": MAX_PRODUCTS}
    if method == "hutchinson":
        return hutchinson(matrix, blocks, n_products=n_products, **common)
    if method == "xtrace":
        return xtrace(matrix, blocks, n_products=n_products, **common)
    if method == "xnystrace":
        return xnystrace(matrix, blocks, n_products=n_products, **common)
    if method == "hutch++":
        sketch = Sketch(matrix, generator=generator)
        return deflated_hutchinson(matrix, blocks, sketch, n_products=n_products, **common)
    krylov = Lanczos(matrix, generator=generator)
    return deflated_hutchinson(matrix, blocks, krylov, n_products=n_products, **common)


def _pyhessian(subject: Subject, n_products: int, tol: float | None, seed: int) -> Estimate:
    if tol is not None:
        raise UserError("PyHessian is asked for a fixed number of probes (n_products); leave tol out.")
    draws = pyhessian_trace_samples(subject.view, subject.loss, subject.data, subject.parameters, n_products, seed)
    return Estimate.of_samples(draws.unsqueeze(1), n_products)


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
    n_products: int = N_PRODUCTS
    n_labels: int = N_LABELS

    name = "hessian_trace"
    version = 4  # part of a record's key: raise it when the numbers change
    needs = ()
    operator = "hessian"

    def __post_init__(self) -> None:
        check_trace(self.method, self.definition, self.operator, self.tol, self.n_products, self.n_labels)

    def __call__(self, point: Point) -> Rows:
        """Rows: see `TraceEstimate.rows`."""
        about: dict[str, Any] = {"loss": point.loss, "seed": point.seed, "operator": self.operator}
        return hessian_trace(point.model, point.batches, **about, **asdict(self)).rows()


@dataclass(frozen=True)
class GaussNewtonTrace(HessianTrace):
    """The probe: `hessian_trace` of the Gauss-Newton matrix, for networks that cannot be differentiated twice.

    Its records are its own, so that no figure shows them as the Hessian's.

    Attributes: see `hessian_trace`.
    """

    name = "gauss_newton_trace"
    version = 1
    operator = "gauss-newton"
