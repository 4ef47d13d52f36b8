"""A landscape of one network: its plane described in rows, then two rows for each point of the grid.

Quantities, all with the layer `all` but where said; axes and networks count from 1:

- `axis_K`: number of grid points along axis K; `samples` holds their coordinates.
- `norm_K`: length of direction K; `cosine`: of the angle between the two.
- `steps_K`, also by layer: how far a grid step moves the weights, root mean square, in quantization steps.
- `signature_K`: inner product with fixed noise over the length, by which a direction is known again.
- `eigenvalue_K`, `residual_K` (hessian); `explained_K` (pca): share of the checkpoints' squared distances.
- `point_P`: loss of network P, `samples` its coordinates on the plane; `projection_P`: loss at these coordinates;
  `gap_P`: the first minus the second; `off_plane_P`: distance from the plane over that from the centre.
- `loss_I_J` (on a line `loss_I`): the loss at a grid point; `rise_I_J`: minus the loss at the centre, image by image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, as_batches
from fpq_analysis.curvature.sampling import layer_of
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction, with_forward
from fpq_analysis.losses import LossFunction
from fpq_analysis.models import model_device
from fpq_analysis.nests import device_of
from fpq_analysis.probes.eigs import hessian_eigs
from fpq_analysis.probes.landscape import directions as geometry
from fpq_analysis.probes.landscape.choices import DEFINITION, LandscapeChoices, quantity
from fpq_analysis.probes.landscape.directions import Move
from fpq_analysis.probes.landscape.movable import MovableNetwork, check_alike, make_movable
from fpq_analysis.probes.landscape.surface import Surface
from fpq_analysis.probes.point import Rows
from fpq_analysis.probes.subject import check_finite, prepare
from fpq_analysis.probes.trace import ROOT
from fpq_analysis.quantizers import adopt, quantizers, view

# A grid step that moves weights further than this, in quantization steps, passes over whole stairs of the staircase.
ALIASED = 0.5
ALIASED_STATUS = "aliased"
# Of the eigenvectors: a landscape is worth no more.
N_PRODUCTS = 200
# Forward passes hold no graph, so that a device can take more images at once than for gradients.
DEVICE_BATCH = 256


class LossGrid:
    """A plane in place, ready to be measured point by point.

    Args:
        model: the centre; not touched.
        auxiliary: further networks: of a trajectory those before its last, the centre (pca), or one or two others.
        batches, seed, loss, device, micro_batch, forward: as for `landscape`.

    Attributes:
        axes: coordinates of the grid along each axis.
        directions: the moves of the variables, one for each axis.
        points: (networks, dim) coordinates on the plane: a trajectory's in its order, the centre last; otherwise the
            centre first; none on planes of directions.
        centre: (N,) losses of the network itself.

    Raises:
        UserError: see `landscape`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batch | Iterable[Batch],
        choices: LandscapeChoices,
        *,
        auxiliary: Sequence[nn.Module] = (),
        seed: int = 0,
        loss: str | LossFunction = "cross_entropy",
        device: str | torch.device | None = None,
        micro_batch: int | None = None,
        forward: ForwardFunction | None = None,
    ) -> None:
        check_auxiliary(choices, len(auxiliary))
        model = with_forward(model, forward)
        where = torch.device(device) if device is not None else model_device(model)
        if micro_batch is None and where.type == "cuda":
            micro_batch = DEVICE_BATCH
        base = "float" if choices.weights == "float" else "dequantized"
        if choices.weights == "requantized":
            batches = as_batches(batches, micro_batch)
            model = adopt(model, batches[0][0])
            if not any(True for _ in quantizers(model)):
                base = "latent"  # by code that is not ours, if at all: as it stands, it rounds again at every point
        subject = prepare(model, batches, loss=loss, definition=base, device=where, micro_batch=micro_batch)
        model = subject.model
        network = make_movable(model, subject.view, choices.weights)
        self.choices = choices
        self.points = np.zeros((0, choices.dim))
        self.notes: Rows = []
        self._states: list[tuple[Move, Move]] = []
        self._off: list[float] = []
        self.common = {
            "layer": "all",
            "definition": choices.weights,
            "estimator": choices.sentence(len(auxiliary)),
            "n_data": subject.n_data,
            "sem": 0.0,
        }
        carried_moves: list[Move] = []
        others = (adopt(with_forward(other, forward), subject.data[0][0]) for other in auxiliary)
        if choices.plane == "random":
            self.directions = geometry.random_directions(network.sizes, choices.dim, seed)
        elif choices.plane == "hessian":
            self.directions = self._eigenvectors(model, subject.data, loss, seed)
        else:
            self.directions, carried_moves = self._follow(network, others, base)
        self.axes = self._grid()
        self._places = {quantity("off_plane", (place,)): place for place in range(len(self.points))}
        self._cells = {quantity("rise", cell): cell for cell in choices.cells()}
        self._describe(network)
        re_estimate = choices.batchnorm == "re-estimate"
        self.surface = Surface(network, subject, self.directions, carried_moves, re_estimate=re_estimate)
        self.centre = self.surface.losses([0.0] * choices.dim)
        check_finite(float(self.centre.mean()), "loss at the centre")

    def _eigenvectors(self, model: nn.Module, data: list[Batch], loss: str | LossFunction, seed: int) -> list[Move]:
        definition = DEFINITION[self.choices.weights]
        found = hessian_eigs(
            model,
            data,
            self.choices.dim,
            loss=loss,
            definition=definition,
            eigenvectors=True,
            seed=seed,
            device=device_of(data[0]),
            n_products=N_PRODUCTS,
        )
        assert found.vectors is not None
        for k in range(self.choices.dim):
            status = "ok" if found.converged[k] else "tolerance not reached"
            about = {"status": status, "n_products": found.n_products}
            self._note(f"eigenvalue_{k + 1}", float(found.values[k]), **about)
            self._note(f"residual_{k + 1}", float(found.residuals[k]), **about)
        return [
            geometry.signed({name: vectors[k] for name, vectors in found.vectors.items()})
            for k in range(self.choices.dim)
        ]

    def _follow(
        self, network: MovableNetwork, auxiliary: Iterable[nn.Module], base: str
    ) -> tuple[list[Move], list[Move]]:
        """Moves of the variables and of what is carried along; the states of all networks are kept to be measured."""
        found = [make_movable(other, view(other, base).cpu(), self.choices.weights) for other in auxiliary]
        check_alike([network, *found])
        states = [(other.variables, other.carried) for other in found]
        here = (_copied(network.variables), _copied(network.carried))
        moves, carried = ([_minus(state[part], here[part]) for state in states] for part in (0, 1))
        products = geometry.gram(moves)
        if self.choices.plane == "pca":
            axes, coordinates, explained = geometry.principal(products, self.choices.dim)
            for k, share in enumerate(explained, 1):
                self._note(f"explained_{k}", float(share))
        else:
            axes, coordinates = geometry.through(products)
        squares = np.diag(products)
        on_plane = np.einsum("ij,jk,ik->i", coordinates, axes.T @ products @ axes, coordinates)
        off = np.sqrt(np.maximum(0.0, squares - on_plane) / np.where(squares > 0, squares, 1.0))
        zero = np.zeros((1, self.choices.dim))
        if self.choices.plane == "pca":
            self.points, self._off = np.concatenate([coordinates, zero]), [*off.tolist(), 0.0]
            self._states = [*states, here]
        else:
            self.points, self._off = np.concatenate([zero, coordinates]), [0.0, *off.tolist()]
            self._states = [here, *states]
        directions, carried_moves = ([geometry.combination(part, axis) for axis in axes.T] for part in (moves, carried))
        return directions, carried_moves

    def _grid(self) -> list[list[float]]:
        choices = self.choices
        if not choices.follows_checkpoints:
            return [geometry.symmetric_grid(choices.points, choices.reach)] * choices.dim
        if choices.plane == "checkpoints" and choices.dim == 1:
            return [geometry.unit_grid(choices.points)]
        return [geometry.covering_grid(column.tolist(), choices.points) for column in self.points.T]

    def _note(self, quantity: str, value: float, **other: Any) -> None:
        self.notes.append({**self.common, "quantity": quantity, "value": value, **other})

    def _describe(self, network: MovableNetwork) -> None:
        """The rows about axes and directions."""
        self.aliased = False
        for k, (axis, direction) in enumerate(zip(self.axes, self.directions, strict=True), 1):
            length = math.sqrt(geometry.inner(direction, direction))
            self._note(f"axis_{k}", float(len(axis)), samples=axis)
            self._note(f"norm_{k}", length)
            self._note(f"signature_{k}", geometry.inner(direction, geometry.noise(direction)) / length)
            self._note_steps(f"steps_{k}", network, direction, axis[1] - axis[0])
        if len(self.directions) == 2:
            one, two = self.directions
            lengths = [math.sqrt(geometry.inner(d, d)) for d in (one, two)]
            self._note("cosine", geometry.inner(one, two) / (lengths[0] * lengths[1]))

    def _note_steps(self, quantity: str, network: MovableNetwork, direction: Move, step: float) -> None:
        """How far a grid step moves the quantized weights, in quantization steps."""
        squares, total = 0.0, 0
        for name, move in network.transmitted(direction).items():
            if name in network.steps:
                ratio = (move * step / network.steps[name].to(move)).cpu().double()
                squares += float(ratio.square().sum())
                total += ratio.numel()
                self._note(quantity, float(ratio.square().mean().sqrt()), layer=layer_of(name) or ROOT)
        if total:
            value = math.sqrt(squares / total)
            aliased = self.choices.weights == "requantized" and value > ALIASED
            self.aliased |= aliased
            self._note(quantity, value, status=ALIASED_STATUS if aliased else "ok")

    def measure(self, piece: str) -> Rows:
        """The four rows of a network on or near the plane, or the two of a grid point."""
        return self._measure_network(self._places[piece]) if piece in self._places else self._measure_cell(piece)

    def _measure_network(self, place: int) -> Rows:
        coordinates = self.points[place].tolist()
        there, projection = self.surface.losses_of(*self._states[place]), self.surface.losses(coordinates)
        rows = [
            {**self._mean(f"point_{place + 1}", there), "samples": coordinates},
            {**self._mean(f"projection_{place + 1}", projection), "samples": coordinates},
            self._mean(f"gap_{place + 1}", there - projection),
            {**self.common, "quantity": f"off_plane_{place + 1}", "value": self._off[place]},
        ]
        # The centre is the last of a trajectory, and the first of the networks named.
        other = place if self.choices.plane == "pca" else place - 1
        return [{**row, "network": other} for row in rows] if 0 <= other < len(self.points) - 1 else rows

    def _measure_cell(self, piece: str) -> Rows:
        cell = self._cells[piece]
        losses = self.surface.losses([axis[i] for axis, i in zip(self.axes, cell, strict=True)])
        status = ALIASED_STATUS if self.aliased else "ok"
        return [
            {**self._mean(quantity(name, cell), values), "status": status}
            for name, values in (("loss", losses), ("rise", losses - self.centre))
        ]

    def _mean(self, quantity: str, values: Tensor) -> dict[str, Any]:
        spread = values.std() if len(values) > 1 else torch.full_like(values[0], math.nan)
        mean, error = torch.stack([values.mean(), spread / math.sqrt(len(values))]).tolist()  # one wait for the device
        numbers = {"value": mean, "sem_data": error, "ci95": 1.96 * error, "n_products": 0}
        return {**self.common, "quantity": quantity, **numbers}


def check_auxiliary(choices: LandscapeChoices, n: int) -> None:
    """Raise `UserError` if the plane is not one of the centre and `n` other networks."""
    if choices.plane == "checkpoints" and n != choices.dim:
        raise UserError(
            f"{n + 1} network(s) for a plane of dimension {choices.dim}: a line (dim=1) goes through two, a plane "
            "(dim=2) through three."
        )
    if choices.plane == "pca" and n < choices.dim:
        raise UserError(
            f"A trajectory of {n + 1} checkpoint(s) has no {choices.dim} principal components about its last; it needs "
            f"at least {choices.dim + 1}."
        )
    if not choices.follows_checkpoints and n:
        raise UserError(
            f"The plane '{choices.plane}' is about one network; auxiliary networks are for 'pca' and 'checkpoints'."
        )


def _copied(state: Move) -> Move:
    return {name: t.detach().clone().cpu() for name, t in state.items()}


def _minus(a: Move, b: Move) -> Move:
    return {name: a[name].detach() - t for name, t in b.items()}
