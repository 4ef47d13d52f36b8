"""The exact trace of the Hessian of a piecewise linear classifier, by sums of squared per-sample gradients.

If every parameter enters the logits z piecewise linearly while the others are held fixed (convolution, linear layer,
BatchNorm in eval mode, ReLU, pooling, residual sums, straight-through quantizers), the second derivative of z by any
single parameter vanishes almost everywhere.  The diagonal of the Hessian of the cross-entropy is then that of the
generalised Gauss-Newton matrix, and

    Tr H = (1/N) sum_n sum_c || J_n^T l_nc ||^2 ,      sum_c l_nc l_nc^T = diag(p_n) - p_n p_n^T ,   p_n = softmax(z_n),

with J_n the Jacobian of the logits of sample n.  C - 1 vectors l suffice for C classes (a Cholesky factor), so the
trace costs one forward and C - 1 backward passes to the *activations*, with no random probe and no second derivative.
It comes apart by sample, and so carries a standard error over the data, and by parameter.

With many classes, l may be drawn instead (`sampled_factor`): a random l with the same second moment, at one backward
pass.

`layers.py` has the norms; `graph.py` proves the condition, for every graph that occurs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.graph import prove_parameters, structure, wanting
from fpq_analysis.curvature.layers import Recorder, check_logits, find_layers
from fpq_analysis.curvature.memory import each

FEW = 2  # images that stand for a batch in the proof


def cross_entropy_factor(logits: Tensor) -> Tensor:
    """L with L L^T = diag(p) - p p^T for each row of `logits` (N, C).

    Returns:
        (C - 1, N, C): column c of every sample's lower triangular factor, in closed form and without cancellation.
    """
    p = logits.softmax(1)
    rest = p.flip(1).cumsum(1).flip(1)  # rest[c] = p[c] + ... + p[C-1]
    n_classes = p.shape[1]
    tiny = torch.finfo(p.dtype).tiny
    columns = []
    for c in range(n_classes - 1):
        here, after = rest[:, c], rest[:, c + 1]
        # Divide in two steps: here * after underflows long before either does.  An empty tail contributes nothing.
        share = (p[:, c] / here.clamp(min=tiny)).sqrt()
        root = after.sqrt()
        column = torch.zeros_like(p)
        column[:, c] = share * root
        column[:, c + 1 :] = -share[:, None] * p[:, c + 1 :] / root.clamp(min=tiny)[:, None]
        columns.append(column)
    return torch.stack(columns)


def label_uniforms(x: Tensor, n_labels: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (N, n_labels) on the device of `x`, from which `sampled_factor` draws labels.

    They are drawn apart from the labels so that these do not depend on how the samples are cut into micro-batches.
    """
    return torch.rand((len(x), n_labels), generator=generator, dtype=torch.float32).to(x.device)


def sampled_factor(logits: Tensor, uniforms: Tensor, balanced: bool = False) -> Tensor:
    """Vectors l_nm for M drawn labels, whose outer products l l^T have the mean diag(p) - p p^T.

    l = e_c - p with c drawn from p; or `balanced`: c drawn from q_c proportional to p_c |e_c - p|^2, and
    l = (p_c / q_c)^(1/2) (e_c - p).  All l of a sample are then of one length, where plain labels give a confident
    network's samples a tiny l nearly always and rarely a huge one.

    Args:
        logits: (N, C).
        uniforms: (N, M) in [0, 1), see `label_uniforms`.

    Returns:
        (M, N, C).
    """
    p = logits.softmax(1)
    q = p
    if balanced:
        lengths = (1 - p).square() + p.square().sum(1, keepdim=True) - p.square()
        q = p * lengths
        q = torch.where(q.sum(1, keepdim=True) > 0, q, p)
        q = q / q.sum(1, keepdim=True)
    labels = torch.searchsorted(q.cumsum(1), uniforms.to(q).contiguous()).clamp(max=p.shape[1] - 1)
    tiny = torch.finfo(p.dtype).tiny
    weights = (p.gather(1, labels) / q.gather(1, labels).clamp(min=tiny)).sqrt()
    return (F.one_hot(labels.T, p.shape[1]) - p) * weights.T[:, :, None]


def per_sample_traces(
    model: nn.Module,
    batches: list[Batch],
    parameters: dict[str, Tensor],
    *,
    n_labels: int | None = None,
    generator: torch.Generator | None = None,
    derivatives: dict[str, Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Contributions of each sample and parameter to the trace of the Hessian of the mean cross-entropy.

    Args:
        model: in eval mode; its parameters' `requires_grad` is ignored.
        batches: micro-batches (inputs, targets) on the model's device; the targets are not used.
        parameters: the variables, by name.
        n_labels: None for the exact sum over classes; M to draw M labels a sample with `generator`, a CPU one.
        derivatives: by parameter name, factors d(parameter)/d(variable) of the parameter's shape: the trace is then
            that with respect to the variable behind the parameter (a latent weight).

    Yields:
        For each micro-batch, by parameter name, a (draws, B) float64 tensor on the CPU; draws is M, or 1 when exact.
        The sum over parameters, averaged over samples (and draws), is the trace.

    Raises:
        NotExactError: if a variable belongs to a layer without an exact form here, or a layer runs twice, or there is
            no proof that the logits are piecewise linear in each variable.
        UserError: if there is not enough memory for a single sample.
    """
    layers = find_layers(model, parameters)
    passes = n_labels or 0
    proven = set()  # another batch may take another way through the model

    def measure(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        nonlocal passes
        x = batch[0]
        with full_precision(), torch.enable_grad(), wanting(model):
            passes = passes or exact_passes(model, x)
            with Recorder(layers, parameters, derivatives or {}, passes) as recorder:
                logits = recorder.run(model, x)
            graph = structure(logits)
            if graph not in proven:
                # Where a few take the same way, custom Functions are tried out on these: on many it takes long.
                with Recorder(layers, parameters, derivatives or {}, passes) as recorder_of_few:
                    same = structure(recorder_of_few.run(model, x[:FEW])) == graph
                prove_parameters(model, x[:FEW] if same else x, parameters)
                proven.add(graph)
            with torch.no_grad():
                z = logits.detach()
                factor = cross_entropy_factor(z) if n_labels is None else sampled_factor(z, batch[1], balanced=True)
            # The classes are summed, so all their gradients go through one product; draws are kept apart.
            groups = [factor] if n_labels is None else factor.split(1)
            parts = [recorder.squared_norms(logits, cotangents) for cotangents in groups]
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    inputs: list[tuple[Tensor, ...]] = [(x,) for x, _ in batches]
    if n_labels is not None:
        assert generator is not None
        inputs = [(x, label_uniforms(x, n_labels, generator)) for (x,) in inputs]
    yield from each(inputs, measure)


@torch.no_grad()
def exact_passes(model: nn.Module, inputs: Tensor) -> int:
    """Backward passes of the exact sum: one for each class but one.

    Raises:
        NotExactError: if the model does not give logits.
    """
    return check_logits(model(inputs[:1]), 1).shape[1] - 1
