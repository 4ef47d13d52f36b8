"""The exact trace of the Hessian of a piecewise linear network, by sums of squared per-sample gradients.

If every parameter enters the outputs z piecewise linearly while the others are held fixed (convolution, linear layer,
BatchNorm in eval mode, ReLU, pooling, residual sums, straight-through quantizers), the second derivative of z by any
single parameter vanishes almost everywhere.  The diagonal of the Hessian of a loss is then that of the generalised
Gauss-Newton matrix, and

    Tr H = (1/N) sum_n sum_k || J_n^T l_nk ||^2 ,      sum_k l_nk l_nk^T = the Hessian of sample n's loss in z_n,

with J_n the Jacobian of the outputs of sample n, and l_nk the loss's `output_factor`: C - 1 vectors for the
cross-entropy of C classes, at each position if outputs have some.  So the trace costs one forward and C - 1 backward
passes to the *activations*, with no random probe and no second derivative.  It comes apart by sample, and so carries a
standard error over the data, and by parameter.

Where that is many, l may be drawn instead (`Loss.drawn_factor`): random vectors with the same second moment, at a
backward pass each.

`layers.py` has the norms; `graph.py` proves the condition, for every graph that occurs.  The right-hand side is the
trace of the Gauss-Newton matrix, of any network: for that, nothing is to be proven, and `by_sample.py` has the norms
where layers have none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.by_sample import SampleBySample
from fpq_analysis.curvature.graph import graph_signature, prove_parameters, requiring_grad
from fpq_analysis.curvature.layers import Recorder, check_rows, find_layers
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.curvature.operations import NotExactError
from fpq_analysis.losses import Loss, draw_uniforms
from fpq_analysis.nests import device_of, size, take
from fpq_analysis.ranks import gathered, share

FEW = 2  # images that stand for a batch in the proof


def per_sample_traces(
    model: nn.Module,
    loss: Loss,
    batches: list[Batch],
    parameters: dict[str, Tensor],
    *,
    n_labels: int | None = None,
    generator: torch.Generator | None = None,
    derivatives: dict[str, Tensor] | None = None,
    gradients: str = "proven",
) -> Iterator[dict[str, Tensor]]:
    """Contributions of each sample and parameter to the trace of the Hessian of the mean loss.

    Args:
        model: in eval mode; its parameters' `requires_grad` is ignored.
        loss: with an `output_factor`.
        batches: micro-batches (inputs, targets) on the model's device.
        parameters: the variables, by name.
        n_labels: None for the exact sum; M to draw M vectors (labels) a sample with `generator`, a CPU one.
        derivatives: by parameter name, factors d(parameter)/d(variable) of the parameter's shape: the trace is then
            that with respect to the variable behind the parameter (a latent weight).
        gradients: `proven`, as above; for the trace of the Gauss-Newton matrix `layers`, without the proof, or
            `samples`, sample by sample for layers of any kind, without `derivatives`.

    Yields:
        For each micro-batch, by parameter name, a (draws, B) float64 tensor on the CPU; draws is M, or 1 when exact.
        The sum over parameters, averaged over samples (and draws), is the trace.

    Raises:
        NotExactError: if a variable belongs to a layer without an exact form here, or a layer runs twice, or there is
            no proof that the outputs are piecewise linear in each variable.
        UserError: if there is not enough memory for a single sample.
    """
    loss = loss.for_targets(y for _, y in batches)
    layers = find_layers(model, parameters) if gradients != "samples" else {}
    passes = n_labels or 0
    proven = set()  # another batch may take another way through the model

    def measure(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        nonlocal passes
        x, y, *uniforms = batch
        wanted = parameters.values() if gradients == "samples" else ()
        with full_precision(), torch.enable_grad(), requiring_grad(model, wanted):
            passes = passes or exact_passes(model, loss, (x, y))
            recorder: Recorder | SampleBySample = SampleBySample(parameters)
            if gradients != "samples":
                recorder = Recorder(layers, parameters, derivatives or {}, passes)
            with recorder:
                outputs = recorder.run(model, x)
            graph = graph_signature(outputs) if gradients == "proven" else None
            if graph is not None and graph not in proven:
                few = take(x, slice(FEW))
                # Where a few take the same way, custom Functions are tried out on these: on many it takes long.
                with Recorder(layers, parameters, derivatives or {}, passes) as recorder_of_few:
                    same = graph_signature(recorder_of_few.run(model, few)) == graph
                prove_parameters(model, few if same else x, parameters)
                proven.add(graph)
            with torch.no_grad():
                z = outputs.detach()
                groups = loss.drawn_factor(z, y, uniforms[0]).split(1) if uniforms else loss.factors(z, y)
            # The sum needs no parts, so its gradients go through few products; draws are kept apart.
            parts = [recorder.squared_norms(outputs, cotangents) for cotangents in groups]
        found = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return found if uniforms else {name: part.sum(0, keepdim=True) for name, part in found.items()}

    parts: list[tuple[Tensor, ...]] = list(batches)
    if n_labels is not None:
        assert generator is not None
        parts = [(x, y, draw_uniforms(size(x), n_labels, generator).to(device_of(x))) for x, y in batches]
    yield from gathered(map_batches(share(parts), measure))


@torch.no_grad()
def exact_passes(model: nn.Module, loss: Loss, batch: Batch) -> int:
    """Backward passes of the exact sum: for the cross-entropy, one for each class but one, at each position.

    Raises:
        NotExactError: if the loss has no `output_factor`, or the model does not give outputs for each sample.
    """
    if loss.output_factor is None:
        raise NotExactError(f"the curvature of the loss '{loss.name}' in the outputs is not known in closed form")
    x, y = take(batch, slice(1))
    return loss.n_factors(check_rows(model(x), 1), y)
