"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531): the student's probabilities towards the teacher's.

The loss is cross-entropy + weight T^2 KL(teacher || student), both softened by the temperature T; T^2 keeps the size of
the gradient.  FPQ gives neither; T = 1 and equal weights are LSQ's own (Esser et al. 2020, section 3.7).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fpq_analysis.training.regularizer import Regularizer


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student), mean over the batch; scalar.

    Args:
        student, teacher: logits, (N, C), float32.
    """
    ours, theirs = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class KD(Regularizer):
    """The loss term `kd`."""

    weight = "kd_weight"
    uses_teacher = True

    def losses(self, logits: Tensor, teacher_logits: Tensor | None) -> dict[str, Tensor]:
        assert teacher_logits is not None
        return {"kd": self.config.kd_weight * kd_loss(logits, teacher_logits, self.config.kd_temperature)}
