"""PyHessian's class (Yao et al. 2020, arXiv:1912.07145): scripts that use it need to change one import line.

    from fpq_analysis.compat.pyhessian import hessian        # instead of: from pyhessian import hessian

Same constructor, methods, attributes and return shapes; the functions of `pyhessian.utils` and `get_esd_plot` of its
`density_plot.py` are here too.  What differs: results are converged or say that they are not; the model is left as it
was; it works on CPU and CUDA alike; parameters that the loss does not use, batches of different sizes and negative
traces are handled; densities work on torch 2.  See docs/from_pyhessian.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fpq_analysis.curvature import CurvatureOperator, as_batches
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.errors import UserError
from fpq_analysis.files import atomic_write
from fpq_analysis.losses import LossFunction
from fpq_analysis.nests import size
from fpq_analysis.probes import hessian_eigs, hessian_trace, spectral_density
from fpq_analysis.probes.subject import Subject, prepare
from fpq_analysis.ranks.wrapped import unwrapped

Vector = Sequence[Tensor]  # in parts, shaped like the parameters


@dataclass
class _CachedState:
    """What was computed for one state of the model, valid until a script moves the weights.

    Attributes:
        state: a copy of the model's parameters and buffers; variables: by name, see `hessian.params`.
    """

    state: dict[str, Tensor]
    subject: Subject
    variables: dict[str, Tensor]
    gradients: list[Tensor] | None = None
    operator: CurvatureOperator | None = None


class hessian:
    """The Hessian of `criterion` on one batch, or on all batches of a loader."""

    def __init__(
        self,
        model: nn.Module,
        criterion: LossFunction,
        data: Batch | None = None,
        dataloader: Iterable[Batch] | None = None,
        cuda: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep what is to be measured.

        Args:
            model: measured in eval mode, as a copy, on the device it is on.
            criterion: (outputs, targets) to the mean over the batch.
            data: one batch (inputs, targets); or
            dataloader: an iterable of such batches, gone through once, here.
            cuda: without effect, as the model's device decides.
            seed: of random vectors (PyHessian draws from the global generator).

        Raises:
            UserError: unless exactly one of `data` and `dataloader` is given.
        """
        if (data is None) == (dataloader is None):
            raise UserError("Give either data=(inputs, targets) or dataloader=..., one of the two.")
        self.model = model
        self.criterion = criterion
        self.batches = as_batches(data if data is not None else list(dataloader or []))
        self.settings: dict[str, Any] = {"loss": criterion, "seed": seed}
        self._last: _CachedState | None = None

    @property
    def params(self) -> list[Tensor]:
        """The variables, in the order of eigenvectors: the model's trainable parameters.

        For a network quantized by this package, Q(w) takes the place of each quantized weight.
        """
        return list(self._current().variables.values())

    @property
    def gradsH(self) -> list[Tensor]:  # noqa: N802
        """The gradient of the mean loss over all data, with its graph, for `hessian_vector_product`.

        Computed at first use and kept, with a graph over all data at once; for much data use `dataloader_hv_product`.
        """
        current = self._current()
        if current.gradients is None:
            n, variables = current.subject.n_data, current.variables
            with full_precision(), torch.enable_grad():
                losses = [
                    self.criterion(functional_call(current.subject.view, variables, (x,)), y) * (size(x) / n)
                    for x, y in current.subject.data
                ]
                current.gradients = list(
                    torch.autograd.grad(
                        torch.stack(losses).sum(), list(variables.values()), create_graph=True, materialize_grads=True
                    )
                )
        return current.gradients

    def dataloader_hv_product(self, v: Vector) -> tuple[float, list[Tensor]]:
        """v^T H v, and H v in parts, H the Hessian of the mean loss over all data.

        Args:
            v: one tensor for each of `params`.
        """
        current = self._current()
        if current.operator is None:
            current.operator = current.subject.operator()
        operator = current.operator
        places = [operator.slices[name] for name in current.variables]
        flat = torch.empty(operator.size, dtype=operator.dtype, device=operator.device)
        for place, part in zip(places, v, strict=True):
            flat[place] = part.detach().to(flat).reshape(-1)
        product = operator.matvec(flat)
        value = float(flat.double() @ product.double())
        return value, [product[place].view_as(part) for place, part in zip(places, v, strict=True)]

    def _current(self) -> _CachedState:
        model = unwrapped(self.model)
        state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        last = self._last
        if last is None or not all(torch.equal(t, last.state[name]) for name, t in state.items()):
            subject = prepare(model, self.batches, loss=self.criterion)
            variables = {name: state.get(name, subject.parameters[name]) for name in self._in_order(subject.parameters)}
            self._last = last = _CachedState(
                {name: t.detach().clone() for name, t in state.items()}, subject, variables
            )
        return last

    def _in_order(self, names: Iterable[str]) -> list[str]:
        """As in the model; weights behind a quantizer, whose names it does not know, after the others."""
        order = {name: place for place, (name, _) in enumerate(unwrapped(self.model).named_parameters())}
        return sorted(names, key=lambda name: order.get(name, len(order)))

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """The `top_n` eigenvalues of largest magnitude, and their eigenvectors.

        Args:
            maxIter: products with vectors for each eigenvalue at most.
            tol: relative residual `|H v - value v| / |value|` (PyHessian: relative change between iterations).

        Returns:
            Eigenvalues, and for each a list of tensors shaped like the model's parameters and in their order, together
            of length 1.  A warning counts values that did not converge.
        """
        found = hessian_eigs(
            self.model,
            self.batches,
            top_n,
            which="LM",
            tol=tol,
            eigenvectors=True,
            n_products=maxIter * top_n,
            **self.settings,
        )
        if not found.converged.all():
            warnings.warn(
                f"{int((~found.converged).sum())} of {top_n} eigenvalues have a relative residual above {tol:g}; "
                "raise maxIter.",
                stacklevel=2,
            )
        vectors = found.vectors
        assert vectors is not None
        order = self._in_order(vectors)
        return found.values.tolist(), [[vectors[name][i] for name in order] for i in range(len(found.values))]

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Numbers whose mean is the trace.

        Its standard error is their standard deviation over the square root of their number: over the data where the
        exact method applies (one number per image), over the probes elsewhere.

        Args:
            maxIter: products with vectors, where the exact method does not apply.
            tol: without effect; PyHessian stops when the mean moves less than this, which says nothing about the error.
        """
        found = hessian_trace(self.model, self.batches, n_products=max(4, maxIter), **self.settings)
        return found.samples.tolist()

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Nodes and weights of stochastic Lanczos quadrature: `n_v` lists of `iter` numbers each."""
        found = spectral_density(self.model, self.batches, n_draws=n_v, n_steps=iter, **self.settings)
        return found.nodes.tolist(), found.weights.tolist()


def hessian_vector_product(gradsH: Vector, params: Vector, v: Vector) -> tuple[Tensor, ...]:
    """H v in parts, by differentiating the gradient once more; zeros where the gradient does not depend on `params`.

    Args:
        gradsH: the gradient with its graph: `hessian.gradsH`, or from `get_params_grad` after
            `loss.backward(create_graph=True)`.
        params: the variables it was taken with respect to.
        v: one tensor for each parameter.
    """
    curved = [(g, part) for g, part in zip(gradsH, v, strict=True) if g.requires_grad]
    if not curved:
        return tuple(torch.zeros_like(p) for p in params)
    with full_precision():
        return torch.autograd.grad(
            [g for g, _ in curved],
            list(params),
            [part for _, part in curved],
            retain_graph=True,
            materialize_grads=True,
        )


def group_product(xs: Vector, ys: Vector) -> Tensor:
    """The inner product of two vectors given in parts, as a scalar tensor."""
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)]).sum()


def group_add(params: list[Tensor], update: Vector, alpha: float | Tensor = 1) -> list[Tensor]:
    """Add `alpha` times `update` to `params`, in place, and return them."""
    with torch.no_grad():
        for p, part in zip(params, update, strict=True):
            p.add_(alpha * part)
    return params


def normalization(v: Vector) -> list[Tensor]:
    """`v` divided by its length; a zero vector is returned as it is."""
    length = group_product(v, v).sqrt()
    return [part / length if length > 0 else part.clone() for part in v]


def orthnormal(w: Vector, v_list: Iterable[Vector]) -> list[Tensor]:
    """The part of `w` orthogonal to `v_list` (orthonormal vectors), scaled to length 1."""
    vectors = list(v_list)
    rest = [part.clone() for part in w]
    for v in vectors * 2:  # twice, as rounding leaves a share of long parts
        rest = group_add(rest, v, -group_product(rest, v))
    return normalization(rest)


def get_params_grad(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The trainable parameters, and their `grad` with its graph, or zeros where there is none."""
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return params, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def get_esd_plot(eigenvalues: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> None:
    """Draw the density of `hessian.density` into `example.pdf`, in the working folder, as PyHessian's script does."""
    import numpy as np

    from fpq_analysis.plots.density import measure_figure
    from fpq_analysis.plots.style import style

    figure = measure_figure(np.atleast_2d(eigenvalues), np.atleast_2d(weights))
    with style():
        atomic_write(
            Path("example.pdf"), lambda file: figure.savefig(file, format="pdf", metadata={"CreationDate": None})
        )


def get_params(model_orig: nn.Module, model_perb: nn.Module, direction: list[Tensor], alpha: float) -> nn.Module:
    """Set `model_perb`'s parameters to `model_orig`'s plus `alpha` times a direction, as PyHessian's tutorial does."""
    with torch.no_grad():
        for original, moved, d in zip(model_orig.parameters(), model_perb.parameters(), direction, strict=True):
            moved.copy_(original + alpha * d)
    return model_perb
