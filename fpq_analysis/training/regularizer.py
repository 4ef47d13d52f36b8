"""What a method adds to training on the cross-entropy: loss terms, noise in the forward passes, a second pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.data import epoch_generator
from fpq_analysis.methods import METHODS, load_class
from fpq_analysis.quantizers import quantizers
from fpq_analysis.training.config import TrainConfig


class Regularizer:
    """One ingredient of a method, made once a run; a subclass overrides what it has.

    Args:
        config: of the run.
        model: the network in training; it is on its device by the first epoch.
        teacher: the float network it started from, in eval mode; None for a float run.

    Attributes:
        weight: name of the setting that turns it off at zero, if there is one.
        uses_teacher: whether `losses` wants the teacher's outputs, which cost a forward pass a step.
    """

    weight: str | None = None
    uses_teacher = False

    def __init__(self, config: TrainConfig, model: nn.Module, teacher: nn.Module | None) -> None:
        self.config = config
        self.model = model
        self.teacher = teacher

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Raise `UserError` if the settings make no sense for it."""

    def during(self, epoch: int) -> AbstractContextManager[Any]:
        """In force while an epoch is trained: hooks, noise."""
        return nullcontext()

    def losses(self, logits: Tensor, teacher_logits: Tensor | None) -> dict[str, Tensor]:
        """Terms of the loss after a forward pass, as weighted in it: name (`loss_<name>` in `train.jsonl`) to scalar.

        Args:
            logits, teacher_logits: (B, C), float32; the teacher's if some regularizer of the run uses them.
        """
        return {}

    def second_pass(self) -> AbstractContextManager[None] | None:
        """Where the gradient that the step takes is computed, by a second pass inside; None: where the weights are."""
        return None

    def generator(self, epoch: int, purpose: str) -> torch.Generator:
        """For noise on the model's device: of its own for every seed, epoch and purpose."""
        seed = epoch_generator(self.config.seed, epoch, purpose).initial_seed()
        return torch.Generator(next(self.model.parameters()).device).manual_seed(seed)


class QuantizerPenalties(Regularizer):
    """What the quantizers themselves add to the loss, of one name summed over the network."""

    def losses(self, logits: Tensor, teacher_logits: Tensor | None) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for _, quantizer, _ in quantizers(self.model):
            for name, penalty in quantizer.penalties(self.config).items():
                found.setdefault(name, []).append(penalty)
        return {name: torch.stack(penalties).sum() for name, penalties in found.items()}


def regularizers(config: TrainConfig, model: nn.Module, teacher: nn.Module | None) -> list[Regularizer]:
    """Those of the run's method that its settings leave on, and the quantizers' penalties.

    Raises:
        UserError: if one of them does not apply to these networks.
    """
    kinds = [load_class(place) for place in METHODS[config.method].regularizers]
    kinds = [kind for kind in kinds if kind.weight is None or getattr(config, kind.weight) > 0]
    return [kind(config, model, teacher) for kind in (*kinds, QuantizerPenalties)]
