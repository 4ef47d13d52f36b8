"""Other means of a loss: over weighted samples; over samples where it is one over positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fpq_analysis.errors import UnfitError, UserError
from fpq_analysis.losses.loss import Loss, wide
from fpq_analysis.nests import Nest, described


def by_sample(loss: Loss) -> Loss:
    """The mean over samples of what each of them is in the mean over its own positions.

    `cross_entropy` and `causal_lm` are a mean over all positions of all samples, in which long samples count for more.

    Raises:
        UserError: for a loss that is a mean over samples already.
    """
    if loss.weights is None:
        raise UserError(f"The loss '{loss.name}' is a mean over samples as it is.")
    own = _BySample(loss, loss.weights)
    return _with(loss, own, f"by_sample({loss.name})", None)


def weighted(loss: Loss) -> Loss:
    """sum(w loss) / sum(w) over all data, for targets (targets, w) with a weight w for each sample, (B,).

    For a sum over samples that is divided by their number whatever the weights, give them a mean of 1.

    Raises:
        UserError: for a sum of losses: its terms are to be weighted.
    """
    if loss.bind is not None or loss.mean is not None:
        raise UserError(f"The loss '{loss.name}' cannot be weighted by sample; weigh the losses it is made of.")
    own = _Weighted(loss)
    return _with(loss, own, f"weighted({loss.name})", own.weights)


def _with(loss: Loss, own: Any, name: str, weights: Callable[[Nest], Tensor] | None) -> Loss:
    """`loss` with those functions of `own` that it has itself."""
    there = {
        field: getattr(own, field) for field in ("output_factor", "draw", "check", "classes") if getattr(loss, field)
    }
    return replace(loss, name=name, per_sample=own.per_sample, weights=weights, **there)


@dataclass(frozen=True)
class _BySample:
    loss: Loss
    counts: Callable[[Nest], Tensor]

    def per_sample(self, outputs: Tensor, targets: Nest) -> Tensor:
        found = self.loss.per_sample(outputs, targets)
        return found / self.counts(targets).to(found)

    def output_factor(self, outputs: Tensor, targets: Nest) -> Tensor:
        assert self.loss.output_factor is not None
        return _scaled(self.loss.output_factor(outputs, targets), self.counts(targets).reciprocal())

    def draw(self, outputs: Tensor, targets: Nest, uniforms: Tensor, balanced: bool) -> Tensor:
        assert self.loss.draw is not None
        return _scaled(self.loss.draw(outputs, targets, uniforms, balanced), self.counts(targets).reciprocal())

    def classes(self, outputs: Tensor, targets: Nest) -> tuple[Tensor, Tensor]:
        assert self.loss.classes is not None
        return self.loss.classes(outputs, targets)

    def check(self, outputs: Tensor, targets: Nest) -> None:
        assert self.loss.check is not None
        self.loss.check(outputs, targets)
        if not bool((self.counts(targets) > 0).all()):
            raise UnfitError(
                f"A sample has no position that counts, so there is no mean over it ('{self.loss.name}' by sample).",
                "Leave such samples out of the data.",
            )


@dataclass(frozen=True)
class _Weighted:
    loss: Loss

    def per_sample(self, outputs: Tensor, targets: Nest) -> Tensor:
        own, w = targets
        found = self.loss.per_sample(outputs, own)
        return found * w.to(found)

    def weights(self, targets: Nest) -> Tensor:
        if not isinstance(targets, (tuple, list)) or len(targets) != 2 or not isinstance(targets[1], Tensor):
            raise self._unfit(targets)
        own, w = targets
        return wide(w) if self.loss.weights is None else wide(w) * wide(self.loss.weights(own))

    def output_factor(self, outputs: Tensor, targets: Nest) -> Tensor:
        assert self.loss.output_factor is not None
        return _scaled(self.loss.output_factor(outputs, targets[0]), targets[1])

    def draw(self, outputs: Tensor, targets: Nest, uniforms: Tensor, balanced: bool) -> Tensor:
        assert self.loss.draw is not None
        return _scaled(self.loss.draw(outputs, targets[0], uniforms, balanced), targets[1])

    def classes(self, outputs: Tensor, targets: Nest) -> tuple[Tensor, Tensor]:
        assert self.loss.classes is not None
        return self.loss.classes(outputs, targets[0])

    def check(self, outputs: Tensor, targets: Nest) -> None:
        own, w = targets
        if w.shape != outputs.shape[:1] or w.is_complex() or not bool((w.isfinite() & (w >= 0)).all()):
            raise self._unfit(targets)
        assert self.loss.check is not None
        self.loss.check(outputs, own)

    def _unfit(self, targets: Nest) -> UnfitError:
        return UnfitError(
            f"A weighted loss wants targets (targets, weights), with one weight for each sample, finite and not below "
            f"zero: they are of {described(targets)}.",
            "Weights of positions go by ignored ones, and of classes by weight=.",
        )


def _scaled(columns: Tensor, squares: Tensor) -> Tensor:
    """(K, B, ...) times the roots of (B,) squares."""
    return columns * squares.to(columns).sqrt().reshape(-1, *[1] * (columns.ndim - 2))
