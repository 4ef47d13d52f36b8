"""Sums of losses, such as the cross-entropy and distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fpq_analysis.errors import UnfitError, UserError
from fpq_analysis.losses.loss import Loss
from fpq_analysis.nests import Nest, described, size


@dataclass(frozen=True)
class Combined:
    """The functions of a `Loss`, by those of its terms."""

    terms: tuple[tuple[float, Loss], ...]

    def mean(self, outputs: Tensor, targets: Nest) -> Tensor:
        """The sum of the terms' own means."""
        return torch.stack([a * loss(outputs, y) for (a, loss), y in zip(self.terms, targets, strict=True)]).sum()

    def per_sample(self, outputs: Tensor, targets: Nest) -> Tensor:
        """(B,)."""
        parts = zip(self.terms, targets, strict=True)
        return torch.stack([a * loss.per_sample(outputs, y) for (a, loss), y in parts]).sum(0)

    def factor(self, outputs: Tensor, targets: Nest) -> Tensor:
        """The columns of all terms, each brought to what is coupled in any."""
        found = []
        for (a, loss), y in zip(self.terms, targets, strict=True):
            assert loss.output_factor is not None
            columns = math.sqrt(a) * loss.output_factor(outputs, y)
            found.append(_isolated(columns, loss.positions(outputs), self.coupled, outputs))
        return torch.cat(found)

    @property
    def coupled(self) -> tuple[int, ...] | None:
        """Axes that any term couples."""
        kinds = [loss.coupled for _, loss in self.terms]
        return None if None in kinds else tuple(dict.fromkeys(axis for kind in kinds for axis in kind or ()))

    def check(self, outputs: Tensor, targets: Nest) -> None:
        """Raise `UnfitError` unless there are fitting targets for each term."""
        self._check_form(targets)
        for (_, loss), y in zip(self.terms, targets, strict=True):
            assert loss.check is not None
            loss.check(outputs, y)

    def classes(self, outputs: Tensor, targets: Nest) -> tuple[Tensor, Tensor]:
        """Of the first term that has any."""
        for (_, loss), y in zip(self.terms, targets, strict=True):
            if loss.classes is not None:
                return loss.classes(outputs, y)
        raise AssertionError

    def bind(self, targets: list[Nest]) -> Loss:
        """The sum of the terms as plain means over samples."""
        for some in targets:
            self._check_form(some)
        own = [(a, loss.for_targets([some[i] for some in targets])) for i, (a, loss) in enumerate(self.terms)]
        made = Combined(tuple(own))
        shares = [torch.stack(made.shares(some)) for some in targets]
        common = all(bool((some == some[0]).all()) for some in shares)
        return replace(_loss(made, bound=True), weights=made.weights if common else None)

    def shares(self, targets: Nest) -> list[Tensor]:
        """(B,) of each term; see `Loss.shares`."""
        pairs = zip(self.terms, targets, strict=True)
        found = [loss.shares(y) for (_, loss), y in pairs]
        return [torch.ones(size(targets), dtype=torch.float64) if some is None else some for some in found]

    def weights(self, targets: Nest) -> Tensor:
        """(B,) of the first term, where all are the same."""
        return self.shares(targets)[0]

    def _check_form(self, targets: Nest) -> None:
        if not isinstance(targets, (tuple, list)) or len(targets) != len(self.terms):
            raise UnfitError(
                f"A sum of {len(self.terms)} losses wants targets for each, a tuple of so many: they are of "
                f"{described(targets)}.",
                "Where two losses have the same targets, give them twice.",
            )


def combined(*terms: tuple[float, Loss]) -> Loss:
    """a_1 loss_1 + a_2 loss_2 + ..., for targets (targets_1, targets_2, ...).

    Each term is a mean of its own, over samples or over the positions that count in it.  Where samples count
    differently in different terms, the errors over the data take the number of positions that count as given.

    Raises:
        UserError: if there is no term, or its number is below zero.
    """
    if not terms or not all(0 <= a < math.inf for a, _ in terms):
        raise UserError("A sum of losses wants terms (number, loss), of which no number is below zero.")
    return _loss(Combined(tuple(terms)), bound=False)


def _loss(own: Combined, bound: bool) -> Loss:
    losses = [loss for _, loss in own.terms]
    return Loss(
        " + ".join(f"{a:g} ({loss.name})" if loss.bind else f"{a:g} {loss.name}" for a, loss in own.terms),
        own.per_sample,
        own.factor if all(loss.output_factor for loss in losses) else None,
        own.coupled,
        mean=None if bound else own.mean,
        check=own.check if all(loss.check for loss in losses) else None,
        classes=own.classes if any(loss.classes for loss in losses) else None,
        resolution=max(loss.resolution for loss in losses),
        bind=own.bind,
        bound=bound,
    )


def _isolated(columns: Tensor, positions: tuple[int, ...], coupled: tuple[int, ...] | None, outputs: Tensor) -> Tensor:
    """(K, B, ...) columns of each position, with one of its own for each place along the axes that are `coupled`."""
    axes = range(1, outputs.ndim) if coupled is None else sorted(axis % outputs.ndim for axis in coupled)
    for axis in set(positions).intersection(axes):
        n = outputs.shape[axis]
        eye = torch.eye(n, dtype=columns.dtype, device=columns.device)
        shape = [n if i == axis else 1 for i in range(1, outputs.ndim)]
        columns = (eye.reshape(n, 1, 1, *shape) * columns).flatten(0, 1)
    return columns
