"""Channel-wise Standardization Distillation: FPQ Eq. 15-17 (Pang & Cai 2025, arXiv:2503.11159).

The raw output of every convolution, student's and teacher's, is standardised channel by channel over batch and space,
and the student is drawn towards the teacher in squared distance.

Departures: (1) Eq. 17 is a plain sum, about 3e7 for ResNet-18 at batch 256, which would drown the cross-entropy; the
default takes the mean over batch, space and channels and sums over layers, `reduction="sum"` is the literal form.
(2) The teacher is in eval mode.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.errors import UserError
from fpq_analysis.quantizers.apply import CONVOLUTIONS
from fpq_analysis.quantizers.fake_quantize import refuse_second_derivative
from fpq_analysis.training.config import TrainConfig
from fpq_analysis.training.regularizer import Regularizer

EPS = 1e-5


class StandardizedDistance(torch.autograd.Function):
    """Mean squared distance between the standardised channels of student and teacher (Eq. 15-17); once differentiable.

    With a, b the standardised features, v = mean(a^2) = 1 - eps / (var + eps), w likewise for b and r = mean(a b), all
    for one channel, the distance is v + w - 2 r: a correlation loss.  Its gradient needs no pass through the
    standardisation: d/ds = 2 / (sqrt(var + eps) n C) ((1 - v + r) a - b), n values a channel, C channels.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        a, _, a_scale = torch.native_batch_norm(student, None, None, None, None, True, 0.0, EPS)
        b, _, b_scale = torch.native_batch_norm(teacher, None, None, None, None, True, 0.0, EPS)
        dims = [d for d in range(a.ndim) if d != 1]
        r = (a * b).mean(dims)
        v, w = 1 - EPS * a_scale**2, 1 - EPS * b_scale**2
        ctx.save_for_backward(a, b, a_scale, v, r)
        return (v + w - 2 * r).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative(StandardizedDistance)
        a, b, a_scale, v, r = ctx.saved_tensors
        shape = [1, -1] + [1] * (a.ndim - 2)
        factor = 2 / a.numel() * grad * a_scale
        return (a * ((1 - v + r) * factor).view(shape)).addcmul_(b, (-factor).view(shape)), None


def csd_loss(student: list[Tensor], teacher: list[Tensor], reduction: str = "mean") -> Tensor:
    """Sum over layers of the distance between standardised features, each (N, C, ...); scalar (Eq. 17)."""
    total = student[0].new_zeros((), dtype=torch.float32)
    for s, t in zip(student, teacher, strict=True):
        distance = StandardizedDistance.apply(s.float(), t.float())
        total = total + (distance * s.numel() if reduction == "sum" else distance)
    return total


class Features:
    """Context manager that keeps the output of every convolution of the last forward pass, in order of names."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, CONVOLUTIONS)}
        self.outputs: dict[str, Tensor] = {}
        self.hooks = ExitStack()

    def __enter__(self) -> Features:
        for name, layer in self.layers.items():
            self.hooks.enter_context(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()
        self.outputs.clear()

    def _hook(self, name: str) -> Any:
        def keep(layer: nn.Module, args: Any, output: Tensor) -> None:
            if layer is self.layers[name]:  # a deep copy has the hook too
                self.outputs[name] = output

        return keep

    def take(self) -> list[Tensor]:
        """The kept outputs, in order of layer names; they are forgotten here, so that memory can be freed.

        Raises:
            UserError: if a convolution has not run since.
        """
        missing = [name for name in self.layers if name not in self.outputs]
        if missing:
            raise UserError(
                f"The convolution '{missing[0]}' has not run since the last distance ({len(missing)} of "
                f"{len(self.layers)} have not). The forward passes whose features are compared must be inside of "
                "'with', one before each distance."
            )
        outputs = [self.outputs[name] for name in self.layers]
        self.outputs.clear()
        return outputs


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raise `UserError` unless both have convolutions under the same names."""
    if not Features(student).layers:
        raise UserError("The model has no convolution, so there are no features to distil; use --csd-weight 0.")
    ours, theirs = (set(Features(model).layers) for model in (student, teacher))
    if ours != theirs:
        raise UserError(
            f"The teacher is another network than the student: only one of them has {sorted(ours ^ theirs)[:3]}. "
            "Distillation compares layer by layer, so it must be of the same form (--init: a run of the same --model)."
        )


class CSDLoss:
    """FPQ's channel-wise standardization distillation, for any training loop (arXiv:2503.11159, Eq. 15-17).

    A context manager, inside of which the convolutions of both networks keep their outputs.  Called with what the
    student was called with, it runs the teacher and gives the term of the loss, a scalar::

        with CSDLoss(model, teacher) as csd:
            for x, y in batches:
                loss = F.cross_entropy(model(x), y) + csd(x)

    Args:
        model: the student; its quantizers may be of any package, as long as its convolutions are `nn.Conv1d`, `2d` or
            `3d` (or derived from these) under the names that they have in the teacher.
        teacher: in eval mode.
        reduction: `mean` over batch, space and channels, or the paper's literal `sum`, which is about 1e7 times larger.

    Raises:
        UserError: if the two have not the same convolutions, or the teacher is in training mode.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise UserError(f"The reduction is '{reduction}'; known are mean and sum.")
        check_pair(model, teacher)
        self.teacher = teacher
        self.reduction = reduction
        self.pair = Features(model), Features(teacher)

    def __enter__(self) -> CSDLoss:
        for features in self.pair:
            features.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for features in self.pair:
            features.__exit__(*error)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The distance of the student's last forward pass, which had these arguments; scalar."""
        if self.teacher.training:
            raise UserError("The teacher is in training mode, where it would learn from the student. teacher.eval()")
        with torch.no_grad():
            self.teacher(*args, **kwargs)
        return self.distance()

    def distance(self) -> Tensor:
        """The distance of both networks' last forward passes; scalar."""
        student, teacher = (features.take() for features in self.pair)
        return csd_loss(student, teacher, self.reduction)


class CSD(Regularizer):
    """The loss term `csd`."""

    weight = "csd_weight"
    uses_teacher = True

    def __init__(self, config: TrainConfig, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__(config, model, teacher)
        self.loss = CSDLoss(model, teacher, config.csd_reduction)

    def during(self, epoch: int) -> CSDLoss:
        """The convolutions of both networks keep their outputs."""
        return self.loss

    def losses(self, logits: Tensor, teacher_logits: Tensor | None) -> dict[str, Tensor]:
        return {"csd": self.config.csd_weight * self.loss.distance()}
