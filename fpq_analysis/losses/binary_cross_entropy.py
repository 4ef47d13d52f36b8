"""The binary cross-entropy with logits: independent labels, such as several for an image, each 0 or 1 or between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fpq_analysis.errors import UnfitError
from fpq_analysis.losses.cross_entropy import class_weights
from fpq_analysis.losses.loss import Loss, stated
from fpq_analysis.nests import Nest, described


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """The functions of a `Loss` for (B, ...) logits and targets of the same shape."""

    pos_weight: tuple[float, ...] | None = None
    weight: tuple[float, ...] | None = None

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B,) means over a sample's labels."""
        weight, pos_weight = (self._tensor(values, outputs) for values in (self.weight, self.pos_weight))
        targets = targets.to(outputs.dtype)
        losses = F.binary_cross_entropy_with_logits(outputs, targets, weight, pos_weight=pos_weight, reduction="none")
        return losses.reshape(len(losses), -1).mean(1)

    def factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The Hessian is diagonal, p (1 - p) / K times the weight of each of K labels: (1, B, ...)."""
        return (self._scales(outputs, targets) * outputs.sigmoid() * (-outputs).sigmoid()).sqrt().unsqueeze(0)

    def draw(self, outputs: Tensor, targets: Tensor, uniforms: Tensor, balanced: bool) -> Tensor:
        """(M, B, ...): y - p of drawn labels y; or `balanced` of their size in the mean, for which signs are drawn."""
        if balanced:
            return self.factor(outputs, targets).expand(uniforms.shape[1], *outputs.shape)
        p = outputs.sigmoid()
        labels = (uniforms.movedim(1, 0).reshape(-1, *outputs.shape) < p).to(p)
        return (labels - p) * self._scales(outputs, targets).sqrt()

    def _scales(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scales = torch.full_like(outputs, 1 / outputs[0].numel())
        weight, pos_weight = (self._tensor(values, outputs) for values in (self.weight, self.pos_weight))
        if pos_weight is not None:
            scales = scales * (1 + (pos_weight - 1) * targets.to(outputs))
        return scales if weight is None else scales * weight

    def check(self, outputs: Tensor, targets: Nest) -> None:
        """Raise `UnfitError` unless there is a label from 0 to 1 for each output."""
        fits = isinstance(targets, Tensor) and not targets.is_complex() and outputs.shape == targets.shape
        if not fits or not 0 <= float(targets.min()) <= float(targets.max()) <= 1:
            raise UnfitError(
                f"The binary cross-entropy wants a label from 0 to 1 for each output: outputs are "
                f"{tuple(outputs.shape)}, and targets of {described(targets)}.",
                "Of classes of which one applies, take the cross-entropy; of several, F.one_hot(...).sum(1) has their "
                "labels.",
            )
        for name, values in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if values is not None and len(values) not in (1, outputs.shape[-1]):
                raise UnfitError(
                    f"{name} has {len(values)} numbers for outputs of shape {tuple(outputs.shape)}.",
                    "Give one for each label, along the last axis.",
                )

    def _tensor(self, values: tuple[float, ...] | None, like: Tensor) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=like.dtype, device=like.device)


def binary_cross_entropy(
    pos_weight: Tensor | tuple[float, ...] | None = None, weight: Tensor | tuple[float, ...] | None = None
) -> Loss:
    """PyTorch's binary cross-entropy with logits, a mean over samples and over the labels of each.

    Args:
        pos_weight: of the positive answer, by label (the last axis), or one for all.
        weight: of each label, likewise.

    Raises:
        UserError: for weights below zero.
    """
    own = BinaryCrossEntropy(class_weights(pos_weight), class_weights(weight))
    name = stated("binary_cross_entropy", own)
    return Loss(name, own.per_sample, own.factor, (), own.draw, check=own.check, resolution=1e-2)


BINARY_CROSS_ENTROPY = binary_cross_entropy()
