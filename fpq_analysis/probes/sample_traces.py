"""Which trace by sample is taken, exact or drawn, by layer or sample by sample, and why; and the taking."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fpq_analysis.curvature import NotExactError, SampleTraces, certify, exact_traces, sampled_traces
from fpq_analysis.curvature.exact import exact_passes
from fpq_analysis.nests import device_of
from fpq_analysis.probes.subject import Subject
from fpq_analysis.progress import Progress
from fpq_analysis.quantizers import latent_derivatives, weight_quantizers

# Above this many passes `auto` draws labels: the exact sum then costs more than the error over the data is worth.
MAX_EXACT_PASSES = 19  # of the cross-entropy of 20 classes


HOLDS = "the certificate holds", "proven piecewise linear in every parameter"
SQUARES = "the Gauss-Newton trace is a sum of squared gradients", "of any network"


def exact_or_sampled(subject: Subject, tol: float | None, holds: tuple[str, str] = HOLDS) -> tuple[str, str]:
    """Which method by sample `auto` takes where they hold, and why: `exact`, or `sampled`.

    Args:
        tol: wanted relative error, or None.
        holds: why they do, and more of it.

    Raises:
        NotExactError: see `exact_passes`.
    """
    passes = exact_passes(subject.view, subject.loss, subject.data[0])
    if tol is not None:
        return "sampled", f"{holds[0]}: as few samples and labels as a relative error of {tol:g} needs"
    if passes > MAX_EXACT_PASSES:
        return "sampled", f"the exact sum would take {passes} backward passes: a few by drawn labels are cheaper"
    return "exact", ": ".join(holds)


def by_sample(
    subject: Subject,
    plain: Callable[[], Subject],
    definition: str,
    operator: str,
    method: str,
    n_labels: int,
    tol: float | None,
    seed: int,
) -> tuple[SampleTraces, str, str]:
    """The traces, how they were taken (`exact` or `sampled`), and why so.

    Args:
        subject: of this definition.
        plain: makes the same of plain weights.
        method: `exact`, `sampled` or `auto`.

    Raises:
        NotExactError: where no such trace holds.
    """
    if operator == "fisher":
        raise NotExactError("the Fisher matrix has labels of its own")
    gauss_newton = operator == "gauss-newton"
    chosen, why = exact_or_sampled(subject, tol, SQUARES if gauss_newton else HOLDS)
    chosen, why = (method, "asked for") if method != "auto" else (chosen, why)
    try:
        measured, derivatives = _plain(subject, plain, definition)
        certify(measured.view, measured.data, measured.parameters, proof=not gauss_newton)
        gradients = "layers" if gauss_newton else "proven"
    except NotExactError:
        if not gauss_newton:
            raise
        measured, derivatives, gradients = subject, {}, "samples"
    of = partial(_traces, measured, derivatives, gradients, chosen, n_labels, tol, seed)
    try:
        return of(), chosen, why
    except NotExactError:  # of a later batch, which takes another way through the network
        if gradients != "layers":
            raise
    return _traces(subject, {}, "samples", chosen, n_labels, tol, seed), chosen, why


def _plain(subject: Subject, plain: Callable[[], Subject], definition: str) -> tuple[Subject, dict[str, torch.Tensor]]:
    """A network of plain weights, and the derivatives of these in the variables, where they are others."""
    if subject.foreign:
        raise NotExactError("the weights are rounded by quantizers that are not of this package")
    if definition != "latent":
        return subject, {}
    mixing = [name for name, (q, _) in weight_quantizers(subject.model).items() if not q.elementwise]
    if mixing:
        raise NotExactError(f"the weight quantizer of '{mixing[0]}' mixes weights")
    # Curvature in w is (dQ/dw)^2 times that in Q(w): Q acts on each weight alone and is piecewise linear.
    where = device_of(subject.data[0])
    return plain(), {name: d.to(where) for name, d in latent_derivatives(subject.model).items()}


def _traces(
    subject: Subject,
    derivatives: dict[str, torch.Tensor],
    gradients: str,
    method: str,
    n_labels: int,
    tol: float | None,
    seed: int,
) -> SampleTraces:
    of = (subject.view, subject.loss, subject.data, subject.parameters, derivatives, gradients)
    with Progress(None if tol else subject.n_data, "hessian_trace", "samples", 1):
        if method == "exact":
            return exact_traces(*of)
        generator = torch.Generator().manual_seed(seed)
        return sampled_traces(*of, generator=generator, n_labels=n_labels, tol=tol)
