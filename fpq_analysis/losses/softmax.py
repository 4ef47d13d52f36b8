"""The covariance of a softmax, diag(p) - p p^T: the Hessian of a cross-entropy in its logits, whatever the labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fpq_analysis.losses.loss import draw_index


def factor(logits: Tensor) -> Tensor:
    """L with L L^T = diag(p) - p p^T for each row of `logits` (B, C), or at each position of (B, C, ...).

    Returns:
        (C - 1, B, C, ...): column c of every lower triangular factor, in closed form and without cancellation.
    """
    p = logits.softmax(1)
    n_classes = p.shape[1]
    rest = p.flip(1).cumsum(1).flip(1)  # rest[c] = p[c] + ... + p[C-1]
    tiny = torch.finfo(p.dtype).tiny
    here, after = rest[:, :-1], rest[:, 1:]
    # Divide in two steps: here * after underflows long before either does.  An empty tail contributes nothing.
    share = (p[:, :-1] / here.clamp(min=tiny)).sqrt().movedim(1, 0).unsqueeze(2)  # (C - 1, B, 1, ...)
    root = after.sqrt().movedim(1, 0).unsqueeze(2)
    columns = -share * p / root.clamp(min=tiny)
    shape = n_classes - 1, 1, n_classes, *[1] * (p.ndim - 2)
    lower = torch.ones(n_classes - 1, n_classes, dtype=torch.bool, device=p.device).triu(1).reshape(shape)
    own = torch.eye(n_classes - 1, n_classes, dtype=torch.bool, device=p.device).reshape(shape)
    return torch.where(lower, columns, torch.where(own, share * root, 0.0))


def draw(logits: Tensor, uniforms: Tensor, balanced: bool = False) -> Tensor:
    """Vectors l for M drawn classes, whose outer products l l^T have the mean diag(p) - p p^T at each position.

    l = e_c - p with c drawn from p; or `balanced`: c drawn from q_c proportional to p_c |e_c - p|^2, and
    l = (p_c / q_c)^(1/2) (e_c - p).  All l of a position are then of one length, where plain classes give a confident
    network a tiny l nearly always and rarely a huge one.

    Args:
        logits: (B, C, ...).
        uniforms: (B, M, ...) in [0, 1), with the positions behind.

    Returns:
        (M, B, C, ...).
    """
    p = logits.softmax(1).movedim(1, -1)  # (B, ..., C)
    q = p
    if balanced:
        lengths = (1 - p).square() + p.square().sum(-1, keepdim=True) - p.square()
        q = p * lengths
        q = torch.where(q.sum(-1, keepdim=True) > 0, q, p)
        q = q / q.sum(-1, keepdim=True)
    classes = draw_index(q, uniforms.movedim(1, -1))  # (B, ..., M)
    tiny = torch.finfo(p.dtype).tiny
    weights = (p.gather(-1, classes) / q.gather(-1, classes).clamp(min=tiny)).sqrt()
    drawn = (F.one_hot(classes.movedim(-1, 0), p.shape[-1]) - p) * weights.movedim(-1, 0).unsqueeze(-1)
    return drawn.movedim(-1, 2)
