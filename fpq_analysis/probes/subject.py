"""What every curvature measurement starts from: the right copy of the model, its variables, data and loss, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fpq_analysis.choices import check_operator
from fpq_analysis.curvature import (
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ResidualOperator,
    as_batches,
    check_samples_apart,
    select,
)
from fpq_analysis.curvature.batches import Batch, full_precision, merged
from fpq_analysis.curvature.sampling import layer_of
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction, running, with_forward
from fpq_analysis.losses import Loss, LossFunction, resolve_loss
from fpq_analysis.models import model_device, model_precision
from fpq_analysis.nests import Nest, device_of, leaves, mapped, moved, size, take
from fpq_analysis.probes.fit import Fit, examine
from fpq_analysis.quantizers import (
    adopt,
    check_definition_applies,
    check_gradient_is_linear,
    check_plain,
    other_quantizers,
    quantizers,
    rounds_weights,
    variables,
)
from fpq_analysis.quantizers import view as take_view
from fpq_analysis.ranks import check_same


@dataclass(frozen=True)
class Subject:
    """One model under one definition, ready to be measured.

    Attributes:
        model: what was handed over, or if other programs' quantizers are in it, a copy with ours in their place.
        view: a copy of it in eval mode, see `quantizers/views.py`.
        data: micro-batches on its device.
        parameters: the variables, by name.
        fit: loss and accuracy on these data.
        micro_batch: the most samples at once, if that was asked for.
        forward: how the model is called, a function (model, inputs) to its outputs; None: as docs/data.md says.
        foreign: whether quantizers of another package round the weights (known in `latent` only).
    """

    model: nn.Module
    view: nn.Module
    data: list[Batch]
    loss: Loss
    parameters: dict[str, Tensor]
    fit: Fit
    micro_batch: int | None = None
    foreign: bool = False

    @property
    def n_data(self) -> int:
        """Number of samples."""
        return sum(map(size, self.data))

    def sample_losses(self, outputs: Tensor, y: Nest) -> Tensor:
        """Each sample's loss: (B,) float64 on the CPU."""
        return self.loss.sample_losses(outputs, y).cpu()

    def operator(
        self, kind: str = "hessian", seed: int = 0, parameters: dict[str, Tensor] | None = None
    ) -> CurvatureOperator:
        """`hessian`, `gauss-newton`, `fisher` (with one label a sample, drawn by `seed`) or the `residual` H - G.

        Args:
            parameters: some of those of the subject, or None for all.

        Raises:
            UserError: for an unknown kind, or a Fisher matrix of a loss that draws no labels.
        """
        if kind != "residual":
            check_operator(kind)
        parameters = self.parameters if parameters is None else parameters
        data = merged(self.data) if self.micro_batch is None else self.data
        if device_of(data[0]).type == "cpu":
            # Second derivatives of channels-last convolutions take up to twice as long on a CPU.
            self.view.to(memory_format=torch.contiguous_format)
            data = [(mapped(Tensor.contiguous, x), y) for x, y in data]
        if kind == "hessian":
            return HessianOperator(self.view, self.loss, data, parameters)
        if kind == "residual":
            return ResidualOperator(self.view, self.loss, data, parameters)
        if kind == "gauss-newton":
            return GaussNewtonOperator(self.view, self.loss, data, parameters)
        return FisherOperator(self.view, self.loss, data, parameters, seed=seed)


def prepare(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | LossFunction = "cross_entropy",
    definition: str = "dequantized",
    parameters: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> Subject:
    """Check and bring together what is to be measured; the model handed over is not touched.

    Args:
        parameters: name patterns (`layer3.*`) of the variables; None for all.

    Raises:
        UserError: for data, targets, a loss, a definition or patterns that do not fit; for a model without variables,
            whose output is random, or mixes samples, or whose weights are rounded by what is not of this package.
    """
    model = with_forward(model, forward)
    where = torch.device(device) if device is not None else model_device(model)
    pairs = as_batches(batches, micro_batch)
    _check_weights(model)
    model = adopt(model, pairs[0][0])
    check_definition_applies(model, definition)
    view = take_view(model, definition).to(where)
    named = variables(view)
    if not named:
        raise UserError("The model has no trainable parameter, so its Hessian is empty.")
    check_same("The network is", lambda: view.state_dict().items())
    check_same("The data are", lambda: ((f"tensor {i}", t) for i, t in enumerate(leaves(pairs), 1)))
    dtype = model_precision(view)
    data = [(moved(x, where, dtype), moved(y, where)) for x, y in pairs]
    resolved = resolve_loss(loss).for_targets(y for _, y in data)
    fit = examine(view, data, resolved)
    with running(data[0][0]):  # one that is made for batches of one size fails here
        check_samples_apart(view, data)
    few, foreign = take(data[0][0], slice(1)), False
    with full_precision():
        _check_differentiable(view, few)
        if definition != "latent":
            check_plain(view, few, definition)
        elif not any(True for _ in quantizers(view)):
            foreign = rounds_weights(view, few)
        if foreign or any(True for _ in other_quantizers(view)):
            check_gradient_is_linear(view, few)
    if parameters is not None:
        named = select(named, [parameters] if isinstance(parameters, str) else list(parameters))
    # A layer's parameters side by side, so that each layer is one block of the matrix.
    layers = list(dict.fromkeys(map(layer_of, named)))
    named = dict(sorted(named.items(), key=lambda item: layers.index(layer_of(item[0]))))
    return Subject(model, view, data, resolved, named, fit, micro_batch, foreign)


def _check_differentiable(view: nn.Module, few: Nest) -> None:
    with torch.enable_grad():
        if not view(few).requires_grad:
            raise UserError(
                "The model's outputs have no gradient in any parameter: its forward runs under torch.no_grad(), or "
                "takes them out of autograd (.detach(), .data, NumPy)."
            )


def _check_weights(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UserError(f"The parameter '{name}' has no shape yet. Run the model once on a batch of data.")
        if p.is_complex():
            raise UserError(
                f"The parameter '{name}' is complex, and curvature here is that in real variables. Write it as its "
                "real and imaginary parts (torch.view_as_real)."
            )


def check_finite(value: float, what: str) -> None:
    """Raise `UserError` if `what` came out as NaN or infinity."""
    if not math.isfinite(value):
        raise UserError(
            f"The {what} is not finite: the loss or a derivative overflowed on these data. Check the inputs for NaN "
            "and their normalisation, or measure in float64 (model.double(), inputs.double())."
        )
