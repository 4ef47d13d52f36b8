"""What every curvature measurement starts from: the right copy of the model, its variables, data and loss, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.curvature import (
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    MixedSamplesError,
    as_batches,
    check_samples_apart,
    select,
)
from fpq_analysis.curvature.batches import Batch, merged
from fpq_analysis.curvature.operator import Loss
from fpq_analysis.curvature.sampling import layer_of
from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.models import model_device
from fpq_analysis.quantizers import variables
from fpq_analysis.quantizers import view as take_view

OPERATORS = ("hessian", "gauss-newton", "fisher")


@dataclass(frozen=True)
class Subject:
    """One model under one definition, ready to be measured.

    Attributes:
        view: a copy of the model in eval mode, see `quantizers/views.py`.
        data: micro-batches on its device.
        loss: (outputs, targets) to the mean; cross_entropy: whether it is that.
        parameters: the variables, by name.
        micro_batch: the most samples at once, if that was asked for.
    """

    view: nn.Module
    data: list[Batch]
    loss: Loss
    cross_entropy: bool
    parameters: dict[str, Tensor]
    micro_batch: int | None = None

    @property
    def n_data(self) -> int:
        """Number of samples."""
        return sum(len(x) for x, _ in self.data)

    def sample_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Each sample's loss: (B,) float64 on the CPU."""
        if self.cross_entropy:
            return F.cross_entropy(outputs.cpu().double(), y.cpu(), reduction="none")
        # The mean over a batch of one is that sample's loss.
        pairs = zip(outputs.split(1), y.split(1), strict=True)
        return torch.stack([self.loss(*pair) for pair in pairs]).cpu().double()

    def operator(self, kind: str = "hessian", seed: int = 0) -> CurvatureOperator:
        """`hessian`, `gauss-newton`, or `fisher` (with one label a sample, drawn by `seed`).

        Raises:
            UserError: for an unknown kind, or a Fisher matrix of another loss than the cross-entropy.
        """
        check_operator(kind)
        data = merged(self.data) if self.micro_batch is None else self.data
        if data[0][0].device.type == "cpu":
            # Second derivatives of channels-last convolutions take up to twice as long on a CPU.
            self.view.to(memory_format=torch.contiguous_format)
            data = [(x.contiguous(), y) for x, y in data]
        if kind == "hessian":
            return HessianOperator(self.view, self.loss, data, self.parameters)
        if kind == "gauss-newton":
            return GaussNewtonOperator(self.view, self.loss, data, self.parameters)
        if not self.cross_entropy:
            raise UserError("The Fisher matrix here is that of the cross-entropy; use operator='gauss-newton'.")
        return FisherOperator(self.view, data, self.parameters, seed=seed)


def prepare(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | Loss = "cross_entropy",
    definition: str = "dequantized",
    parameters: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
) -> Subject:
    """Check and bring together what is to be measured; the model handed over is not touched.

    Args:
        parameters: name patterns (`layer3.*`) of the variables; None for all.

    Raises:
        UserError: for data, targets, a loss, a definition or patterns that do not fit, or a model without variables.
    """
    where = torch.device(device) if device is not None else model_device(model)
    data = [(x.to(where), y.to(where)) for x, y in as_batches(batches, micro_batch)]
    view = take_view(model, definition).to(where)
    named = variables(view)
    if not named:
        raise UserError("The model has no trainable parameter, so its Hessian is empty.")
    if parameters is not None:
        named = select(named, [parameters] if isinstance(parameters, str) else list(parameters))
    # A layer's parameters side by side, so that each layer is one block of the matrix.
    layers = list(dict.fromkeys(map(layer_of, named)))
    named = dict(sorted(named.items(), key=lambda item: layers.index(layer_of(item[0]))))
    function, cross_entropy = _loss(loss)
    _check_data(view, data, cross_entropy)
    return Subject(view, data, function, cross_entropy, named, micro_batch)


def check_operator(kind: str) -> None:
    """Raise `UserError` unless it is one of `OPERATORS`."""
    if kind not in OPERATORS:
        raise UserError(f"Unknown operator '{kind}'{did_you_mean(kind, OPERATORS)}. Known: {', '.join(OPERATORS)}.")


def check_finite(value: float, what: str) -> None:
    """Raise `UserError` if `what` came out as NaN or infinity."""
    if not math.isfinite(value):
        raise UserError(
            f"The {what} is not finite: the loss or a derivative overflowed on these data. Check the inputs for NaN "
            "and their normalisation, or measure in float64 (model.double(), inputs.double())."
        )


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
