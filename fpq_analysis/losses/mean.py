"""Which loss it is, and whether it is what every method assumes: a mean over samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.errors import UnfitError, UserError

Loss = Callable[[Tensor, Tensor], Tensor]
# Relative disagreement of a batch's loss with the mean of its samples' that is no rounding, in float64 and below it.
FINE, COARSE = 1e-6, 1e-4
PLAIN_MEAN = (
    "Give a plain mean over the samples. Of weighted classes: loss=lambda outputs, targets: F.cross_entropy(outputs, "
    "targets, weight=w, reduction='none').mean(). Samples to be ignored: leave them out of the data."
)


def resolve_loss(loss: str | Loss) -> tuple[Loss, bool]:
    """The loss as a function (outputs, targets) to the mean, and whether it is the cross-entropy.

    It is for `cross_entropy`, `F.cross_entropy`, and `nn.CrossEntropyLoss` itself with its default settings.  Any other
    function is taken for what it computes.

    Raises:
        UserError: for a name that is not known.
    """
    if isinstance(loss, str):
        if loss != "cross_entropy":
            raise UserError(
                f"Unknown loss '{loss}'. Give 'cross_entropy', or a function (outputs, targets) to the mean."
            )
        return F.cross_entropy, True
    plain = type(loss) is nn.CrossEntropyLoss and repr(vars(loss)) == repr(vars(nn.CrossEntropyLoss()))
    return (F.cross_entropy, True) if plain or loss is F.cross_entropy else (loss, False)


def check_targets(outputs: Tensor, y: Tensor) -> None:
    """Raise `UnfitError` unless the cross-entropy takes `y`, whole numbers from 0 to C - 1, for (N, C, ...) outputs."""
    n_classes = outputs.shape[1] if outputs.ndim > 1 else 0
    whole = not (y.is_floating_point() or y.is_complex())
    if whole and y.shape == outputs.shape[:1] + outputs.shape[2:] and 0 <= int(y.min()) <= int(y.max()) < n_classes:
        return
    raise UnfitError(
        f"Cross-entropy here wants whole-number targets from 0 to C - 1 (C = {n_classes} outputs), one a sample.",
        "For soft or ignored targets give the loss as a function, loss=lambda outputs, targets: ..., that is a mean "
        "over the samples.",
    )


def check_mean(loss: Loss, outputs: Tensor, y: Tensor) -> Tensor:
    """Each sample's loss, (B,), if `loss` of the batch is their mean, its slope in the outputs included.

    A batch of one is tried twice over, so that a sum shows.

    Raises:
        UnfitError: if the loss fails on these data, or is no scalar, random, not differentiable, or no mean over
            samples.
    """
    n = len(outputs)
    if n == 1:
        outputs, y = torch.cat([outputs, outputs]), torch.cat([y, y])
    with torch.enable_grad():
        z, y = _precise(loss, outputs.detach(), y)
        z.requires_grad_()
        together, again = (_scalar(loss, z, y) for _ in range(2))
        if bool(together != again) and bool(together.isfinite()):
            raise UnfitError("The loss gives another number each time.", "Take the random numbers out of it.")
        if not together.requires_grad:
            cure = "Write it in differentiable operations, without argmax, .item(), .detach() or NumPy."
            raise UnfitError("The loss cannot be differentiated in the outputs.", cure)
        singles = torch.stack([_scalar(loss, *one) for one in zip(z.split(1), y.split(1), strict=True)])
        # Of a linear function of the outputs the slope is a constant, and of a constant it is none.
        slopes = [torch.autograd.grad(t, z, materialize_grads=True)[0] for t in (together, singles.mean())]
    singles = singles.detach()
    allowed = FINE if together.dtype == torch.float64 else COARSE
    if bool(together.isfinite()) and bool(singles.isfinite().all()):
        apart = (together - singles.mean()).abs() > allowed * singles.abs().mean()
        bent = (slopes[0] - slopes[1]).norm() > allowed * slopes[1].norm()
        if not bool(apart) and not bool(bent):
            return singles[:n]
        if bool((together - singles.sum()).abs() <= allowed * singles.abs().sum()):
            cure = "Use reduction='mean', or divide it by len(outputs)."
            raise UnfitError("The loss adds up its samples where every measurement takes a mean over them.", cure)
    elif not bool(together.isfinite()):
        return singles[:n]  # which the caller finds
    raise UnfitError(
        "The loss of a batch is not the mean of its samples' losses: it weighs them by one another, as weights of "
        "classes or ignore_index do under reduction='mean'.",
        PLAIN_MEAN,
    )


def _precise(loss: Loss, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, if the loss and the device know it."""
    try:
        wide = z.double(), y.double() if y.is_floating_point() else y
        loss(*wide)
    except Exception:  # the user's code: anything can happen
        return z.clone(), y
    return wide


def _scalar(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    try:
        value = loss(z, y)
    except Exception as error:  # the user's code: anything can happen
        what = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:120].rstrip('.')}"
        many = "a single sample" if len(z) == 1 else f"{len(z)} samples"
        raise UnfitError(
            f"The loss cannot be computed on {many} ({what}).",
            "Check the shapes and types of outputs and targets; it must take a batch of any size.",
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UnfitError(f"The loss gives {what}, not one number.", "Return its mean over the batch, as a tensor.")
    return value.reshape(())
