"""The cross-entropy of a softmax over classes: of samples, or of positions (pixels, tokens) of samples.

Its Hessian in the logits of a position is s (diag(p) - p p^T), p = softmax(z), with s the sum of what is asked of each
class: 1, or the weight of the labelled class, or 0 where it is ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fpq_analysis.errors import UnfitError, UserError
from fpq_analysis.losses import softmax
from fpq_analysis.losses.loss import Loss, stated, wide
from fpq_analysis.nests import Nest, described

IGNORED = -100  # PyTorch's
ROUNDING = 1e-3  # of probabilities in float16
PLAIN = "Give a tensor with the number of each sample's class, or another loss."


@dataclass(frozen=True)
class CrossEntropy:
    """The functions of a `Loss` for (B, C, ...) logits; `cross_entropy` makes it of them.

    Targets are whole numbers (B, ...), or of every class its probability, (B, C, ...).
    """

    weight: tuple[float, ...] | None = None
    ignore_index: int = IGNORED
    label_smoothing: float = 0.0

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B,) sums over the positions."""
        targets = targets if targets.is_floating_point() else targets.long()
        losses = F.cross_entropy(
            outputs,
            targets.to(outputs.dtype) if targets.is_floating_point() else targets,
            self._class_weights(outputs),
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return losses.flatten(1).sum(1) if losses.ndim > 1 else losses

    def factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(C - 1, B, C, ...) columns at each position."""
        return self._scaled(softmax.factor(outputs), outputs, targets)

    def draw(self, outputs: Tensor, targets: Tensor, uniforms: Tensor, balanced: bool) -> Tensor:
        """(M, B, C, ...): a class at each position."""
        return self._scaled(softmax.draw(outputs, uniforms, balanced), outputs, targets)

    def _scaled(self, columns: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.weight is None and not targets.is_floating_point() and not self._may_be_ignored(targets):
            return columns
        return columns * self._asked(outputs, targets).sqrt().unsqueeze(1)

    def _asked(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """s, (B, ...)."""
        c, smoothing = outputs.shape[1], self.label_smoothing
        weights = self._class_weights(outputs)
        if targets.is_floating_point():
            soft = (1 - smoothing) * targets.to(outputs) + smoothing / c
            return (soft if weights is None else soft * weights.reshape(-1, *[1] * (soft.ndim - 2))).sum(1)
        valid = (targets != self.ignore_index).to(outputs)
        if weights is None:
            return valid
        return ((1 - smoothing) * weights[targets.long().clamp(0, c - 1)] + smoothing / c * weights.sum()) * valid

    def weights(self, targets: Tensor) -> Tensor:
        """(B,): positions that count, by the weight of their class; of probabilities all, as in PyTorch."""
        if not isinstance(targets, Tensor):
            raise self._unfit(f"there is a {type(targets).__name__}")
        if targets.is_floating_point():
            n = targets[0, :1].numel() if targets.ndim > 1 else 1
            return torch.full((len(targets),), float(n), device=targets.device)
        counts = wide(targets != self.ignore_index)
        weights = self._class_weights(counts)
        if weights is not None:
            counts = counts * weights[targets.to(counts.device).long().clamp(0, len(weights) - 1)]
        return counts.flatten(1).sum(1) if counts.ndim > 1 else counts

    def classes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and labels; of probabilities, that of the most probable class."""
        if targets.is_floating_point():
            return outputs, targets.argmax(1)
        return outputs, torch.where(targets == self.ignore_index, -1, targets)

    def check(self, outputs: Tensor, targets: Nest) -> None:
        """Raise `UnfitError` unless the targets are classes or probabilities for (B, C, ...) outputs."""
        n_classes = outputs.shape[1] if outputs.ndim > 1 else 0
        found = f"outputs are {tuple(outputs.shape)}, and targets of {described(targets)}"
        if not isinstance(targets, Tensor) or targets.is_complex() or targets.dtype == torch.bool:
            raise self._unfit(found, n_classes)
        if self.weight is not None and len(self.weight) != n_classes:
            raise UnfitError(
                f"There are {len(self.weight)} weights for {n_classes} classes.", "Give one for each class."
            )
        if targets.is_floating_point():
            if targets.shape != outputs.shape or n_classes < 2:
                raise self._unfit(found, n_classes, _cure_of_shape(outputs, targets))
            if not bool((targets >= 0).all()) or not bool(((targets.sum(1) - 1).abs() <= ROUNDING).all()):
                raise self._unfit(f"{found}, which are no probabilities that add up to 1 over the classes", n_classes)
            return
        if targets.shape != outputs.shape[:1] + outputs.shape[2:]:
            raise self._unfit(found, n_classes, _cure_of_shape(outputs, targets))
        classes = targets[targets != self.ignore_index]
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < n_classes:
            low, high = int(classes.min()), int(classes.max())
            from_one = "Count classes from 0: give y - 1."
            cure = from_one if low == 1 and high == n_classes else "Look whether model and data have the same classes."
            raise self._unfit(f"they go from {low} to {high}", n_classes, cure)

    def _unfit(self, found: str, n_classes: int | None = None, cure: str = PLAIN) -> UnfitError:
        most = f" (C = {n_classes} outputs)" if n_classes is not None else ""
        return UnfitError(
            f"Cross-entropy here wants whole-number targets from 0 to C - 1{most}, one a sample or position, or "
            f"{self.ignore_index} where it is ignored; or a probability for each class: {found}.",
            cure,
        )

    def _may_be_ignored(self, targets: Tensor) -> bool:
        return targets.device.type == "meta" or bool((targets == self.ignore_index).any())

    def _class_weights(self, like: Tensor) -> Tensor | None:
        return None if self.weight is None else torch.tensor(self.weight, dtype=like.dtype, device=like.device)


def _cure_of_shape(outputs: Tensor, targets: Tensor) -> str:
    """What to do about targets whose shape or type does not fit (B, C, ...) outputs."""
    wanted = outputs.shape[:1] + outputs.shape[2:]
    if targets.is_floating_point() and outputs.numel() == len(outputs):  # one number a sample
        return "For real numbers as targets take another loss, as loss='squared_error' (--loss squared_error)."
    if targets.is_floating_point() and targets.shape == wanted:
        return "Give classes as whole numbers: y.long()."
    if not targets.is_floating_point() and targets.shape == outputs.shape:
        return "Give one-hot targets as classes, y.argmax(1), or as probabilities, y.float()."
    if targets.ndim > 1 and targets.shape[1] == 1 and targets.shape[:1] + targets.shape[2:] == wanted:
        return "Take the axis of length 1 out: y.squeeze(1)."
    if outputs.ndim > 2 and targets.shape == outputs.shape[:-1]:
        return (
            "Classes stand along the second axis of the outputs. Of one that stands along the last, as in language "
            "models, take loss='causal_lm' or 'token_classification'."
        )
    return PLAIN


def cross_entropy(
    weight: Tensor | tuple[float, ...] | None = None, ignore_index: int = IGNORED, label_smoothing: float = 0.0
) -> Loss:
    """PyTorch's cross-entropy of all data in one batch, `F.cross_entropy(model(X), Y, weight, ...)`.

    Its mean is over all positions that count, by the weights of their classes; `by_sample` is that over samples.

    Args:
        weight: of each class.
        ignore_index: the target of positions that do not count.
        label_smoothing: share of the targets that is spread evenly over the classes.

    Raises:
        UserError: for settings out of range.
    """
    own = CrossEntropy(class_weights(weight), ignore_index, label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"label_smoothing is {label_smoothing}; give a share, from 0 to 1.")
    return Loss(
        stated("cross_entropy", own),
        own.per_sample,
        own.factor,
        (1,),
        own.draw,
        own.weights,
        check=own.check,
        classes=own.classes,
        resolution=1e-2,  # curvature is then off by about a per cent
    )


def class_weights(weight: Tensor | tuple[float, ...] | None) -> tuple[float, ...] | None:
    """As plain numbers; `UserError` unless they are weights."""
    if weight is None:
        return None
    found = tuple(float(w) for w in weight)
    if not all(0 <= w < math.inf for w in found):
        raise UserError(f"The class weights are {list(found)}; they must be finite, and none below zero.")
    return found


CROSS_ENTROPY = cross_entropy()
