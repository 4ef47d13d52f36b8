"""The monitor as a callback of Hugging Face's Trainer; needs `pip install 'fpq-analysis[transformers]'`."""

from __future__ import annotations

from typing import Any

from fpq_analysis.errors import UserError
from fpq_analysis.integrations.monitor import CurvatureMonitor

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise UserError(
        f"The Trainer's callback needs transformers ({error}). Install it: pip install 'fpq-analysis[transformers]'"
    ) from error


class TransformersMonitor(TrainerCallback):
    """Calls a `CurvatureMonitor` before the first epoch and after each.

    ::

        Trainer(..., callbacks=[TransformersMonitor(CurvatureMonitor(HessianTrace(), data, out="runs/mine"))])

    Args:
        monitor: what measures.
        steps: call it at the steps of the optimizer instead of epochs, which the records then count: those that the
            monitor's `every` divides.
    """

    def __init__(self, monitor: CurvatureMonitor, *, steps: bool = False) -> None:
        self.monitor = monitor
        self.steps = steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any
    ) -> None:
        """Epoch 0, or that at which a training is resumed."""
        self.monitor(about["model"], state.global_step if self.steps else round(state.epoch or 0))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """An epoch is finished."""
        if not self.steps:
            self.monitor(about["model"], round(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """A step of the optimizer is."""
        if self.steps:
            self.monitor(about["model"], state.global_step)
