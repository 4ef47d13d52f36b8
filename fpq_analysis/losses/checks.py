"""Is a loss what every method assumes, a mean over samples?  Tried out on outputs and targets."""

from __future__ import annotations

import torch
from torch import Tensor

from fpq_analysis.errors import UnfitError
from fpq_analysis.losses.loss import Loss, LossFunction
from fpq_analysis.nests import Nest, described, joined, leaves, mapped, raw, split

# Relative disagreement of a batch's loss with the mean of its samples' that is no rounding, in float64 and below it.
FINE, COARSE = 1e-6, 1e-4
PLAIN_MEAN = (
    "Of PyTorch's cross-entropy give the module itself, nn.CrossEntropyLoss(weight=w, ignore_index=i), whose mean over "
    "all data is known here. Of a function of your own make a Loss with weights=, or a plain mean over the samples "
    "(docs/losses.md)."
)


def check_mean(loss: LossFunction, outputs: Tensor, y: Nest) -> Tensor:
    """Each sample's loss, (B,), if `loss` of the batch is their mean, its slope in the outputs included.

    A batch of one is tried twice over, so that a sum shows.

    Raises:
        UnfitError: if the loss fails on these data, changes them, or is no scalar, random, not differentiable, or no
            mean over samples.
    """
    n = len(outputs)
    if n == 1:
        outputs, y = joined([(outputs, y)] * 2)
    _check_unchanged(loss, outputs, y)
    with torch.enable_grad():
        z, y = _precise(loss, outputs.detach(), y)
        z.requires_grad_()
        together, again = (_scalar(loss, z, y) for _ in range(2))
        if bool(together != again) and bool(together.isfinite()):
            raise UnfitError("The loss gives another number each time.", "Take the random numbers out of it.")
        if not together.requires_grad:
            cure = "Write it in differentiable operations, without argmax, .item(), .detach() or NumPy."
            raise UnfitError("The loss cannot be differentiated in the outputs.", cure)
        singles = torch.stack([_scalar(loss, *one) for one in split((z, y), 1)])
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
    if isinstance(y, Tensor) and y.is_floating_point() and y.shape != outputs.shape:
        shapes = f"outputs are {tuple(outputs.shape)}, and targets {tuple(y.shape)}"
        raise UnfitError(
            f"The loss of a batch is not the mean of its samples' losses: {shapes}, of which an operation makes pairs "
            "of different samples (broadcasting).",
            "Bring the targets into the outputs' shape.",
        )
    raise UnfitError(
        "The loss of a batch is not the mean of its samples' losses: it weighs them by one another, as weights of "
        "classes or ignore_index do under reduction='mean'.",
        PLAIN_MEAN,
    )


def check_factor(loss: Loss, outputs: Tensor, targets: Nest) -> None:
    """Raise `UnfitError` unless `output_factor` has the shape it must, and is a factor of the Hessian in the outputs.

    In float64, by one product of the Hessian with a random vector for each sample.
    """
    assert loss.output_factor is not None
    with torch.enable_grad():
        z, y = _precise(loss, outputs.detach(), targets)
        z.requires_grad_()
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype).to(z.device)
        try:
            columns = loss.output_factor(z.detach(), y)
        except Exception as error:  # the user's code: anything can happen
            what = f"{type(error).__name__}: {error}"
            raise UnfitError(f"The output_factor of the loss '{loss.name}' fails ({what}).", "Mend it.") from error
        if not isinstance(columns, Tensor) or not columns.is_floating_point():
            what = f"a tensor of type {columns.dtype}" if isinstance(columns, Tensor) else f"a {type(columns).__name__}"
            raise UnfitError(f"The output_factor of '{loss.name}' gives {what}.", "Give a tensor of real numbers.")
        if columns.ndim != z.ndim + 1 or columns.shape[1:] != z.shape:
            raise UnfitError(
                f"The output_factor of the loss '{loss.name}' is of shape {tuple(columns.shape)} for outputs of shape "
                f"{tuple(z.shape)}.",
                "Give (K, *outputs.shape): K vectors for each sample, or each position (coupled=).",
            )
        (slope,) = torch.autograd.grad(loss.per_sample(z, y).sum(), z, create_graph=True, materialize_grads=True)
        curved = torch.zeros_like(z)
        if slope.requires_grad:
            (curved,) = torch.autograd.grad(slope, z, v, materialize_grads=True)
    coupled = [axis + 1 for axis in range(1, z.ndim) if axis not in loss.positions(z)]
    along = columns * v
    claimed = (columns * (along.sum(coupled, keepdim=True) if coupled else along)).sum(0)
    allowed = FINE if z.dtype == torch.float64 else COARSE
    size = torch.maximum(curved.norm(), claimed.norm()) + allowed  # what is smaller is rounding
    if not bool((curved - claimed).norm() <= allowed * size):
        raise UnfitError(
            f"The output_factor L of the loss '{loss.name}' is not one of its Hessian in the outputs: L L^T v and "
            f"autograd's H v differ by {float((curved - claimed).norm() / size):.0e}.",
            "Mend it, or leave it out (None): estimators then take the place of the exact trace.",
        )


def _check_unchanged(loss: LossFunction, outputs: Tensor, targets: Nest) -> None:
    """Raise `UnfitError` if the loss changes what it is given: it would be another loss at the next call."""
    before = outputs.detach(), targets
    given = mapped(Tensor.clone, before)
    with torch.no_grad():
        _scalar(loss, *given)
    # Written to, though it may be the same that stood there; or by a way past autograd, which keeps no count.
    if any(a._version or raw(a) != raw(b) for a, b in zip(leaves(given), leaves(before), strict=True)):
        raise UnfitError("The loss changes its outputs or targets in place.", "Let it work on a copy: y = y.clone().")


def _precise(loss: LossFunction, z: Tensor, y: Nest) -> tuple[Tensor, Nest]:
    """The same in float64, if the loss and the device know it."""
    try:
        wide = z.double(), mapped(lambda t: t.double() if t.is_floating_point() else t, y)
        loss(*wide)
    except Exception:  # the user's code: anything can happen
        return z.clone(), y
    return wide


def _scalar(loss: LossFunction, z: Tensor, y: Nest) -> Tensor:
    try:
        value = loss(z, y)
    except Exception as error:  # the user's code: anything can happen
        what = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:120].rstrip('.')}"
        many = "a single sample" if len(z) == 1 else f"{len(z)} samples"
        raise UnfitError(
            f"The loss cannot be computed on {many} ({what}).",
            "Check the shapes and types of outputs and targets; it must take a batch of any size.",
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        what = f"a tensor of {described(value)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UnfitError(f"The loss gives {what}, not one real number.", "Return its mean over the batch, as a tensor.")
    return value.reshape(())
