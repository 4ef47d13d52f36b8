"""The monitor as a callback of Lightning's trainer; needs `pip install 'fpq-analysis[lightning]'`."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from fpq_analysis.errors import UserError
from fpq_analysis.integrations.monitor import CurvatureMonitor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise UserError(
        f"Lightning's callback needs lightning ({error}). Install it: pip install 'fpq-analysis[lightning]'"
    ) from error


class LightningMonitor(Callback):
    """Calls a `CurvatureMonitor` before the first epoch and after each.

    ::

        Trainer(callbacks=[LightningMonitor(CurvatureMonitor(HessianTrace(), data, out="runs/mine"))])

    If the monitor has no `log` of its own, its numbers go to the trainer's loggers.

    Args:
        monitor: what measures.
        network: the attribute of the LightningModule that is the network (`net`, say); None for the module itself,
            whose `forward` then gives the outputs.
        steps: call it at these steps of the optimizer instead of epochs, which the records then count: those that the
            monitor's `every` divides.
    """

    def __init__(self, monitor: CurvatureMonitor, network: str | None = None, *, steps: bool = False) -> None:
        self.monitor = monitor
        self.network = network
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epoch 0, or that at which a training is resumed."""
        self._call(trainer, pl_module, trainer.global_step if self.steps else trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is finished."""
        if not self.steps:
            self._call(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A step is, perhaps: several batches may make one."""
        if self.steps:
            self._call(trainer, pl_module, trainer.global_step)

    def _call(self, trainer: Trainer, module: LightningModule, count: int) -> None:
        numbers = self.monitor(module if self.network is None else attrgetter(self.network)(module), count)
        if numbers and self.monitor.log is None:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
