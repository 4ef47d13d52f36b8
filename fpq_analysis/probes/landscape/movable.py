"""A copy of a network that can be moved: which of its tensors a landscape moves, for each kind of weights.

    kind              variables that move    the loss is that of
    dequantized       w_hat, at first Q(w)   the network with weights w_hat
    requantized       w                      ... with weights Q(w): rounded again, a staircase
    straight-through  w                      ... with weights Q(w0) + M (w - w0), M = 1 in range, 0 where clipped
    float             w                      ... with weights w, without quantizers, those of inputs neither

w0 is the centre.  Biases and BatchNorm's parameters are variables of every kind.  What is not a variable (BatchNorm's
statistics, quantizers' scales, zero points and offsets, frozen parameters) is carried
along: on planes of directions it stays as it is; on planes of checkpoints it moves linearly with the weights, so that
the checkpoints themselves lie on the plane.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpq_analysis.errors import UserError
from fpq_analysis.probes.landscape.directions import Move
from fpq_analysis.quantizers import Quantizer, latent_derivatives, quantizers, variables
from fpq_analysis.quantizers.apply import latent_weight
from fpq_analysis.quantizers.base import MIN_STEP


@dataclass(frozen=True)
class MovableNetwork:
    """A copy of a network with its state in reach.

    Attributes:
        view: the copy, in eval mode, with plain weights.
        variables: the tensors that directions are added to, by plain name.
        carried: all else of floating point in its state, which is carried along.
        sizes: values of the variables at the centre, by which filters are normalised (for straight-through weights the
            trained w, which is not a tensor of the copy).
        rounded: for requantized weights: quantizer, name of the variable it rounds, weight of the copy it fills.
        masks: for straight-through weights: which part of a move reaches the network, 0 or 1.
        steps: quantization step of each quantized weight, broadcastable to it.
        floors: bounds below which carried tensors must not fall.
        form: what must be equal for a line between two networks to make sense.
    """

    view: nn.Module
    variables: Move
    carried: Move
    sizes: Move
    rounded: list[tuple[Quantizer, str, Tensor]]
    masks: Move
    steps: Move
    floors: dict[str, float]
    form: list[str]

    def transmitted(self, direction: Move) -> Move:
        """The part of a direction that reaches the network's weights."""
        return {name: d * self.masks[name] if name in self.masks else d for name, d in direction.items()}


def make_movable(model: nn.Module, view: nn.Module, weights: str) -> MovableNetwork:
    """Make `view` movable in this kind of weights.

    Args:
        model: the network itself; not touched.
        view: a copy of it, plain in its weights (`quantizers/views.py`), from now on the landscape's own.

    Raises:
        UserError: for straight-through weights whose quantizer is not element-wise.
    """
    layers = dict(model.named_modules())
    found = {name: q for name, q, is_weight in quantizers(model) if is_weight}
    latent = {f"{name}.weight".lstrip("."): latent_weight(layers[name]) for name in found}
    steps = {f"{name}.weight".lstrip("."): q.step_size.detach() for name, q in found.items()}
    view.requires_grad_(False)
    tensors = dict(_tensors(view))
    moved = {name: tensors[name] for name in variables(model)}
    sizes = {name: t.detach().clone() for name, t in moved.items()}
    rounded, masks = [], {}
    owners: list[nn.Module] = [view]
    if weights in ("requantized", "straight-through"):
        for name in latent.keys() & moved.keys():
            sizes[name] = torch.empty_like(moved[name]).copy_(latent[name].detach())
    if weights == "straight-through":
        masks = _masks(model, moved, found)
    if weights == "requantized":
        for layer, quantizer in found.items():
            name = f"{layer}.weight".lstrip(".")
            if name in moved:
                own = copy.deepcopy(quantizer).eval().requires_grad_(False).to(moved[name].device)
                rounded.append((own, name, moved[name]))
                moved[name] = sizes[name].clone()
                tensors.update({f"{name}.quantizer.{key}": t for key, t in _tensors(own)})
                owners.append(own)
    carried = {name: t for name, t in tensors.items() if name not in moved and t.is_floating_point()}
    form = [f"'{name}' of shape {tuple(t.shape)}" for name, t in (*moved.items(), *carried.items())]
    if weights != "float":
        form += [
            f"{type(q).__name__} of {q.bits} bits for the {'weight' if is_weight else 'input'} of '{name}'"
            for name, q, is_weight in quantizers(model)
        ]
    return MovableNetwork(view, moved, carried, sizes, rounded, masks, steps, _floors(owners, carried), sorted(form))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _masks(model: nn.Module, moved: Move, found: dict[str, Quantizer]) -> Move:
    mixing = [name for name, quantizer in found.items() if not quantizer.elementwise]
    if mixing:
        raise UserError(
            f"The weight quantizer of '{mixing[0]}' mixes weights, so a straight-through move has no simple form. Use "
            "the weights 'dequantized', or 'requantized'."
        )
    derivatives = latent_derivatives(model)
    return {name: derivatives[name].to(moved[name]) for name in moved.keys() & derivatives.keys()}


def _floors(owners: list[nn.Module], carried: Move) -> dict[str, float]:
    """Step sizes stay positive and variances not negative, wherever a line leads."""
    bounds: dict[int, float] = {}
    for module in (m for owner in owners for m in owner.modules()):
        if isinstance(module, Quantizer):
            bounds.update({id(scale): MIN_STEP for scale in module.scales()})
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            bounds[id(module.running_var)] = 0.0
    return {name: bounds[id(t)] for name, t in carried.items() if id(t) in bounds}


def check_alike(networks: list[MovableNetwork]) -> None:
    """Raise `UserError` unless lines between these networks make sense."""
    for place, other in enumerate(networks[1:], 2):
        if other.form != networks[0].form:
            ours, theirs = (set(network.form) for network in (networks[0], other))
            example = min(ours ^ theirs)
            raise UserError(
                f"Networks 1 and {place} are not of one architecture and quantization, so there is no line between "
                f"them (for example, only one has: {example}). Runs of different bits, or a float and a quantized "
                "one, have float weights in common: weights='float' (--weights float)."
            )
