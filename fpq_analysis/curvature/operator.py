"""Curvature matrices of a mean loss as linear operators on flat vectors: Hessian, Gauss-Newton, Fisher.

All are means over samples, are differentiated (never by differences), and go through the data in micro-batches that
count by their number of samples, so that a ragged last one is not overrated.  What can be built once for all vectors,
the graph of the gradient or of the outputs, is kept for later products as far as memory allows: a product then costs
about two gradients, and without it nearly four.

Flat vectors are rows, of the variables one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.memory import GraphStore, map_batches
from fpq_analysis.curvature.second_derivatives import SecondDerivatives, check_twice
from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.losses import Loss, LossFunction, draw_uniforms
from fpq_analysis.nests import device_of, size
from fpq_analysis.ranks import added, share

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

MAX_DENSE_BYTES = 2**33


class CurvatureOperator(ABC):
    """A symmetric (n, n) matrix, n the number of scalar variables.

    Args:
        model: in the mode it is to be measured in; its loss must be a sum over samples (BatchNorm in eval mode).
        loss: a `Loss`, or a function (outputs, targets) to the *mean* over the batch.
        batches: micro-batches (inputs, targets), on the model's device; they are halved when memory runs out.
        parameters: the variables, by name; flat vectors hold them in this order.
        graph_bytes: memory for the graphs of micro-batches that are kept between products; None for half of what
            is free when the first one is built.

    Attributes:
        size, dtype, device: of the variables.
        slices: by parameter name, its place in a flat vector.
        n_data: samples; n_products: products with single vectors so far.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        batches: Sequence[Batch],
        parameters: dict[str, Tensor],
        graph_bytes: int | None = None,
    ) -> None:
        """Take what is to be differentiated; nothing is computed yet."""
        self.model = model
        self.loss = loss.for_targets(y for _, y in batches) if isinstance(loss, Loss) else loss
        self.batches: list[tuple[Tensor, ...]] = share(batches)
        self.parameters = list(parameters.values())
        self.n_data = sum(map(size, batches))
        self.n_products = 0
        sizes = [p.numel() for p in self.parameters]
        self.size = sum(sizes)
        self.dtype = self.parameters[0].dtype
        self.device = self.parameters[0].device
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.slices = {name: slice(end - size, end) for name, size, end in zip(parameters, sizes, ends, strict=True)}
        self._graphs = GraphStore(self.parameters, graph_bytes)
        self._checkpointed = False  # whether the network is known to run blocks again in its backward pass

    @property
    def graph_bytes(self) -> int:
        """Memory that the graphs kept between products take."""
        return self._graphs.taken

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.size, self.size)

    def release(self) -> bool:
        """Let go of the graphs that are kept, and keep fewer from now on; whether there were any."""
        taken = self._graphs.taken
        self._graphs.clear()
        return taken > 0

    def matvec(self, v: Tensor) -> Tensor:
        """A v for a flat vector (n,)."""
        return self.products(v[None])[0]

    def products(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """A v for every row v of (k, n): (k, n), in `out` if given; the rows share what does not depend on them.

        Raises:
            UserError: if there is not enough memory for a single sample.
        """
        result = torch.empty_like(v) if out is None else out
        begun = False

        def add(batch: tuple[Tensor, ...]) -> None:
            nonlocal begun
            try:
                with SecondDerivatives(exchanged=not self._checkpointed):
                    graph = self._graphs.of(batch, self._graph)
                parts = [self._product(graph, row) for row in v]
            except CheckpointError:
                if self._checkpointed:
                    raise
                # What a backward pass runs again, it runs outside of the mode: so is all of it from now on.
                self._checkpointed, self._graphs = True, GraphStore(self.parameters, self._graphs.limit)
                return add(batch)
            except RuntimeError as error:
                self._graphs.clear()  # they may be what memory is wanting for
                check_twice(error)
                raise
            for row, part in zip(result, parts, strict=True):
                for where, product in zip(self.slices.values(), part, strict=True):
                    if product is not None:
                        row[where].add_(product.reshape(-1)) if begun else row[where].copy_(product.reshape(-1))
                    elif not begun:
                        row[where].zero_()
            begun = True

        def work() -> Iterator[None]:
            yield from map_batches(self.batches, add, len(v))
            if not begun:  # a rank without samples
                result.zero_()

        with full_precision(), torch.enable_grad():
            added(work(), result)
        self.n_products += len(v)
        return result

    def dense(self, at_once: int = 64) -> Tensor:
        """The whole matrix, a product a row.

        Raises:
            UserError: if it would take more than 8 GiB.
        """
        if self.size**2 * self.dtype.itemsize > MAX_DENSE_BYTES:
            raise UserError(f"A dense matrix of {self.size:,} variables does not fit; restrict it to some by `select`.")
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        # Row i of the products is A e_i, a column of A: they differ where a custom backward makes it asymmetric.
        return torch.cat([self.products(rows) for rows in identity.split(at_once)]).T

    def to_scipy(self) -> LinearOperator:
        """The operator for SciPy's solvers; vectors travel through the CPU."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(v: Any) -> Any:
            columns = torch.as_tensor(v, dtype=self.dtype, device=self.device)
            return self.products(columns.reshape(self.size, -1).T.contiguous()).T.cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=matmat, rmatvec=matmat, matmat=matmat, dtype=dtype)

    @abstractmethod
    def _graph(self, batch: tuple[Tensor, ...]) -> Any:
        """What all vectors share for one micro-batch."""

    @abstractmethod
    def _product(self, graph: Any, v: Tensor) -> Sequence[Tensor | None]:
        """The micro-batch's share of A v, by parameter; None for zeros."""

    def _by_parameter(self, v: Tensor) -> list[Tensor]:
        return [v[where].view_as(p) for where, p in zip(self.slices.values(), self.parameters, strict=True)]


class HessianOperator(CurvatureOperator):
    """H = (1/N) sum_n of the Hessian of loss_n, by differentiating the gradient once more (Pearlmutter 1994)."""

    def _graph(self, batch: tuple[Tensor, ...]) -> list[tuple[int, Tensor]]:
        x, y = batch
        loss = self.loss(self.model(x), y) * (size(x) / self.n_data)
        # A parameter the loss does not use has no gradient; one it is linear in has a constant gradient.
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        return [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def _product(self, graph: list[tuple[int, Tensor]], v: Tensor) -> Sequence[Tensor | None]:
        if not graph:
            return [None] * len(self.parameters)
        parts = self._by_parameter(v)
        sources, gradients = zip(*graph, strict=True)
        return torch.autograd.grad(
            gradients, self.parameters, [parts[i] for i in sources], retain_graph=True, allow_unused=True
        )


class GaussNewtonOperator(CurvatureOperator):
    """G = (1/N) sum_n J_n^T (d2 loss / d z_n d z_n) J_n, J_n the Jacobian of the outputs z_n (Schraudolph 2002).

    Positive semidefinite for a loss that is convex in the outputs.  J v comes from differentiating u -> J^T u, which is
    linear, once more.
    """

    def _graph(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, list[tuple[int, Tensor]], Any]:
        z = self.model(batch[0])
        if not z.requires_grad:
            return z, z, [], None
        dummy = torch.zeros_like(z, requires_grad=True)
        back = torch.autograd.grad(z, self.parameters, dummy, create_graph=True, allow_unused=True)
        used = [(i, g) for i, g in enumerate(back) if g is not None]
        return z, dummy, used, self._at_outputs(z.detach(), batch)

    def _product(self, graph: Any, v: Tensor) -> Sequence[Tensor | None]:
        z, dummy, back, outputs = graph
        if not back:
            return [None] * len(self.parameters)
        parts = self._by_parameter(v)
        sources, transposed = zip(*back, strict=True)
        (moved,) = torch.autograd.grad(transposed, dummy, [parts[i] for i in sources], retain_graph=True)
        curved = self._output_product(outputs, moved)
        if curved is None:
            return [None] * len(self.parameters)
        return torch.autograd.grad(z, self.parameters, curved, retain_graph=True, allow_unused=True)

    def _at_outputs(self, z: Tensor, batch: tuple[Tensor, ...]) -> Any:
        z = z.requires_grad_()
        loss = self.loss(z, batch[1]) * (len(z) / self.n_data)
        (slope,) = torch.autograd.grad(loss, z, create_graph=True)
        return z, slope

    def _output_product(self, outputs: Any, moved: Tensor) -> Tensor | None:
        z, slope = outputs
        if not slope.requires_grad:
            return None
        (curved,) = torch.autograd.grad(slope, z, moved, retain_graph=True, allow_unused=True)
        return curved


class FisherOperator(GaussNewtonOperator):
    """F = (1/(N M)) sum over samples and M labels drawn from the model of the gradient's outer product.

    An unbiased estimate, over the labels, of the Gauss-Newton matrix.  The labels, one at each position of the outputs,
    are drawn once, by `seed`, whatever the micro-batches; it is not the "empirical Fisher", which takes the data's own
    labels.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Batch],
        parameters: dict[str, Tensor],
        n_labels: int = 1,
        seed: int = 0,
    ) -> None:
        """As for every `CurvatureOperator`.

        Raises:
            UserError: for a loss that draws no labels.
        """
        if loss.draw is None:
            raise UserError(
                f"There are no labels to draw for the loss '{loss.name}', of which the Fisher matrix is made; use "
                "operator='gauss-newton'."
            )
        super().__init__(model, loss, batches, parameters)
        generator = torch.Generator().manual_seed(seed)
        drawn = [(x, y, draw_uniforms(size(x), n_labels, generator).to(device_of(x))) for x, y in batches]
        self.batches = share(drawn)

    def _at_outputs(self, z: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(self.loss, Loss)
        _, targets, uniforms = batch
        return self.loss.drawn_factor(z, targets, uniforms, balanced=False)

    def _output_product(self, outputs: Tensor, moved: Tensor) -> Tensor:
        inner = outputs * moved
        inner = inner.sum(tuple(range(2, inner.ndim)), keepdim=True) if inner.ndim > 2 else inner
        return (outputs * inner).sum(0) / (len(outputs) * self.n_data)


def select(parameters: dict[str, Tensor], patterns: str | Sequence[str]) -> dict[str, Tensor]:
    """The parameters whose name matches one of the patterns (`layer3.*`, `*.bias`), in their own order.

    Raises:
        UserError: if a pattern matches none.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise UserError(
                f"No parameter is called '{pattern}'{did_you_mean(pattern, parameters)}. "
                "Patterns are of the form 'layer3.*' or '*.bias'."
            )
    return {name: p for name, p in parameters.items() if any(fnmatchcase(name, pattern) for pattern in wanted)}
