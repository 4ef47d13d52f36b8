"""The cross-entropy of a softmax over classes, with one class number a sample.

Its Hessian in the logits is diag(p) - p p^T, p = softmax(z), whatever the targets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.errors import UnfitError
from fpq_analysis.losses.loss import Loss, draw_index


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of (B, C, ...) logits and (B, ...) classes, the mean over what is behind the classes: (B,)."""
    targets = targets if targets.is_floating_point() else targets.long()
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def factor(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """L with L L^T = diag(p) - p p^T for each row of `logits` (B, C).

    Returns:
        (C - 1, B, C): column c of every sample's lower triangular factor, in closed form and without cancellation.
    """
    p = logits.softmax(1)
    rest = p.flip(1).cumsum(1).flip(1)  # rest[c] = p[c] + ... + p[C-1]
    tiny = torch.finfo(p.dtype).tiny
    columns = p.new_zeros(p.shape[1] - 1, *p.shape)
    for c, column in enumerate(columns):
        here, after = rest[:, c], rest[:, c + 1]
        # Divide in two steps: here * after underflows long before either does.  An empty tail contributes nothing.
        share = (p[:, c] / here.clamp(min=tiny)).sqrt()
        root = after.sqrt()
        column[:, c] = share * root
        column[:, c + 1 :] = -share[:, None] * p[:, c + 1 :] / root.clamp(min=tiny)[:, None]
    return columns


def draw(logits: Tensor, uniforms: Tensor, balanced: bool = False) -> Tensor:
    """Vectors l for M drawn classes, whose outer products l l^T have the mean diag(p) - p p^T.

    l = e_c - p with c drawn from p; or `balanced`: c drawn from q_c proportional to p_c |e_c - p|^2, and
    l = (p_c / q_c)^(1/2) (e_c - p).  All l of a sample are then of one length, where plain classes give a confident
    network's samples a tiny l nearly always and rarely a huge one.

    Args:
        logits: (B, C).
        uniforms: (B, M) in [0, 1).

    Returns:
        (M, B, C).
    """
    p = logits.softmax(1)
    q = p
    if balanced:
        lengths = (1 - p).square() + p.square().sum(1, keepdim=True) - p.square()
        q = p * lengths
        q = torch.where(q.sum(1, keepdim=True) > 0, q, p)
        q = q / q.sum(1, keepdim=True)
    classes = draw_index(q, uniforms)
    tiny = torch.finfo(p.dtype).tiny
    weights = (p.gather(1, classes) / q.gather(1, classes).clamp(min=tiny)).sqrt()
    return (F.one_hot(classes.T, p.shape[1]) - p) * weights.T[:, :, None]


def check(outputs: Tensor, targets: Tensor) -> None:
    """Raise `UnfitError` unless the targets are whole numbers from 0 to C - 1 for (B, C, ...) outputs."""
    n_classes = outputs.shape[1] if outputs.ndim > 1 else 0
    whole = not (targets.is_floating_point() or targets.is_complex())
    one_each = targets.shape == outputs.shape[:1] + outputs.shape[2:]
    if whole and one_each and 0 <= int(targets.min()) <= int(targets.max()) < n_classes:
        return
    raise UnfitError(
        f"Cross-entropy here wants whole-number targets from 0 to C - 1 (C = {n_classes} outputs), one a sample.",
        "For soft or ignored targets give the loss as a function, loss=lambda outputs, targets: ..., that is a mean "
        "over the samples.",
    )


CROSS_ENTROPY = Loss(
    "cross_entropy",
    per_sample,
    output_factor=factor,
    draw=draw,
    check=check,
    resolution=1e-2,  # curvature is then off by about a per cent
    equivalents=(F.cross_entropy, nn.CrossEntropyLoss),
)
