"""Distillation (Hinton et al. 2015, arXiv:1503.02531): T^2 KL(teacher || student), both softened by a temperature T."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fpq_analysis.errors import UnfitError, UserError
from fpq_analysis.losses import softmax
from fpq_analysis.losses.loss import Loss, stated
from fpq_analysis.nests import Nest, described


@dataclass(frozen=True)
class Distillation:
    """The functions of a `Loss` for (B, C, ...) logits, with the teacher's as targets."""

    temperature: float = 1.0

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B,) means over the positions."""
        student, teacher = ((z / self.temperature).log_softmax(1) for z in (outputs, targets.to(outputs)))
        apart = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return self.temperature**2 * apart.reshape(len(apart), -1).mean(1)

    def factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The Hessian is diag(q) - q q^T, q the softened prediction, at each position: (C - 1, B, C, ...)."""
        return softmax.factor(outputs / self.temperature) / _positions(outputs) ** 0.5

    def draw(self, outputs: Tensor, targets: Tensor, uniforms: Tensor, balanced: bool) -> Tensor:
        """(M, B, C, ...): a class at each position."""
        return softmax.draw(outputs / self.temperature, uniforms, balanced) / _positions(outputs) ** 0.5

    def check(self, outputs: Tensor, targets: Nest) -> None:
        """Raise `UnfitError` unless there is a logit of the teacher's for each output."""
        if not isinstance(targets, Tensor) or outputs.ndim < 2 or targets.shape != outputs.shape:
            raise UnfitError(
                f"Distillation wants the teacher's logits as targets, of the outputs' shape {tuple(outputs.shape)}: "
                f"they are of {described(targets)}.",
                "Compute them once, with the teacher in eval mode.",
            )
        if not bool(targets.isfinite().all()):
            raise UnfitError("The teacher's logits hold NaN or infinity.", "Look at the teacher, and at its inputs.")


def _positions(outputs: Tensor) -> int:
    return outputs[0, 0].numel()


def distillation(temperature: float = 1.0) -> Loss:
    """T^2 KL(teacher || student), a mean over samples and over the positions of each (arXiv:1503.02531).

    Raises:
        UserError: for a temperature that is not above zero.
    """
    if not temperature > 0:
        raise UserError(f"The temperature is {temperature}, and must be above zero.")
    own = Distillation(temperature)
    name = stated("distillation", own)
    return Loss(name, own.per_sample, own.factor, (1,), own.draw, check=own.check, resolution=1e-2)


DISTILLATION = distillation()
