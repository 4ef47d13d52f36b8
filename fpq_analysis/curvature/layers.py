"""Squared norms of the samples' gradients, layer by layer, from what a layer saw and what comes back to it.

A layer's share of the norm of a sample's gradient is || D^T P ||_F^2, D (positions x outputs) the gradient at the
layer's output and P (positions x inputs) the patches it saw; or, where positions are few, the sum of (D D^T) * (P P^T),
whose second factor serves all backward passes.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fpq_analysis.curvature.operations import NotExactError
from fpq_analysis.nests import Nest, size

FORWARDS = {kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, _BatchNorm, nn.SyncBatchNorm)}


def find_layers(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, nn.Module]:
    """The layers that own the variables, by name.

    Raises:
        NotExactError: if a variable is in no supported layer, or in two.
    """
    wanted = {id(p): name for name, p in parameters.items()}
    owners: dict[str, str] = {}
    layers: dict[str, nn.Module] = {}
    for layer_name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if id(p) not in wanted:
                continue
            # Subclasses pass where they compute as their base does, as `parametrize`'s do.
            if type(module).forward not in FORWARDS:
                raise NotExactError(
                    f"'{wanted[id(p)]}' belongs to a {type(module).__name__}, which has no exact form here"
                )
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise NotExactError(f"'{layer_name}' is a BatchNorm that uses the batch's own statistics")
            if wanted[id(p)] in owners:
                raise NotExactError(f"'{wanted[id(p)]}' is shared by '{owners[wanted[id(p)]]}' and '{layer_name}'")
            owners[wanted[id(p)]] = layer_name
            layers[layer_name] = module
    lost = [name for name in parameters if name not in owners]
    if lost:
        raise NotExactError(f"'{lost[0]}' is not a plain parameter of a layer")
    return layers


def check_rows(outputs: Tensor, n: int) -> Tensor:
    """`outputs`, if they are (n, ...); otherwise `NotExactError`."""
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != (n,):
        raise NotExactError("the model does not give outputs for each input")
    return outputs


class Recorder:
    """Keeps what each layer saw in a forward pass, and turns gradients at its output into squared norms.

    What is kept is a fresh tensor made at once (patches, or their Gram matrix), and gradients are caught by tensor
    hooks: both are safe from later in-place operations such as `ReLU(inplace=True)`.
    """

    def __init__(
        self, layers: dict[str, nn.Module], parameters: dict[str, Tensor], derivatives: dict[str, Tensor], passes: int
    ) -> None:
        self.layers = layers
        self.names = {id(p): name for name, p in parameters.items()}
        self.derivatives = derivatives
        self.passes = passes  # backward passes to come, to choose between patches and Gram matrices
        self.n = 0
        self.leaves: list[Tensor] = []
        self.seen: dict[str, _Seen] = {}
        self.hooks = ExitStack()

    def __enter__(self) -> Recorder:
        for name, layer in self.layers.items():
            # Ahead of others, which may change the output: a quantizer's, say.
            self.hooks.enter_context(layer.register_forward_hook(self._hook(name), prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()

    def run(self, model: nn.Module, x: Nest) -> Tensor:
        """The outputs (B, C) with a graph that ends at the layers' outputs."""
        self.n = size(x)
        outputs = check_rows(model(x), self.n)
        idle = [name for name in self.layers if name not in self.seen]
        if idle:
            raise NotExactError(f"the layer '{idle[0]}' did not run in the forward pass")
        return outputs

    def _hook(self, name: str) -> Any:
        def record(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if name in self.seen:
                raise NotExactError(f"the layer '{name}' runs more than once in a forward pass")
            if not args or not torch.is_grad_enabled():
                raise NotExactError(f"the layer '{name}' is called by keyword, or with gradients switched off")
            if len(args[0]) != self.n or len(output) != self.n:
                raise NotExactError(f"the first axis of what '{name}' sees is not that of the samples")
            seen = self.seen[name] = _Seen(layer, args[0].detach(), self._variables(layer), self.passes)
            if not output.requires_grad:
                # Nothing before this layer wants gradients: the graph starts here.
                leaf = output.detach().requires_grad_()
                self.leaves.append(leaf)
                output = leaf.clone()  # an in-place operation may follow, which a leaf does not allow
            output.register_hook(seen.take)
            return output

        return record

    def _variables(self, layer: nn.Module) -> dict[str, tuple[str, Tensor | None]]:
        own = {}
        for kind, p in layer.named_parameters(recurse=False):
            if id(p) in self.names:
                name = self.names[id(p)]
                own[kind] = (name, self.derivatives.get(name))
        return own

    def squared_norms(self, outputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """sum_k ||J_n^T cotangents[k, n]||^2 by parameter name, (B,) float64 on the CPU each.

        Args:
            cotangents: (K, B, C).
        """
        for cotangent in cotangents:
            torch.autograd.grad(outputs, self.leaves, cotangent, retain_graph=True, allow_unused=True)
        norms: dict[str, Tensor] = {}
        for seen in self.seen.values():
            norms.update(seen.squared_norms())
        zeros = torch.zeros(len(outputs), dtype=torch.float64)  # for a layer that does not reach the outputs
        return {name: norms.get(name, zeros).cpu().double() for name in self.names.values()}


class _Seen:
    """One layer in one forward pass, and the gradients that come back to it.

    B samples, G groups, T positions, I inputs a group and patch, O outputs a group, K backward passes.
    """

    def __init__(
        self, layer: nn.Module, x: Tensor, variables: dict[str, tuple[str, Tensor | None]], passes: int
    ) -> None:
        self.layer = layer
        self.variables = variables
        self.gram = False
        self.derivative: Tensor | None = None
        # From each backward pass: the bias's gradient (B, channels), the weight's of a BatchNorm (B, channels), or for
        # other layers the gradient at the output (B, T, channels), from which all passes' weights are done at once.
        self.bias: list[Tensor] = []
        self.scale: list[Tensor] = []
        self.outputs: list[Tensor] = []
        if "weight" not in variables:
            return
        if isinstance(layer, _BatchNorm):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            self.patches = (_positions_first(layer, x) - layer.running_mean) * (layer.running_var + layer.eps).rsqrt()
            return
        derivative = variables["weight"][1]
        patches = _patches(layer, x)  # (B, G, T, I)
        groups, positions, inputs = patches.shape[1:]
        assert isinstance(layer.weight, Tensor)
        outputs = layer.weight.shape[0] // groups
        if derivative is not None and not bool((derivative == 1).all()):
            # A mask needs the entries of the gradient themselves, in the order (G, O, I).
            self.derivative = _weight_as_patches(layer, derivative).reshape(groups, outputs, inputs)
        columns = passes * outputs
        self.gram = self.derivative is None and bool(positions * (columns + inputs) < columns * inputs)
        if self.gram:
            self.patches = patches @ patches.mT
        else:
            shared = patches.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()  # a linear layer, say
            self.patches = patches.clone() if shared else patches

    @torch.no_grad()
    def take(self, grad: Tensor) -> None:
        """Keep what is needed of the gradient at the layer's output."""
        d = _positions_first(self.layer, grad)
        if "bias" in self.variables:
            self.bias.append(d.sum(1))
        if "weight" in self.variables:
            if isinstance(self.layer, _BatchNorm):
                self.scale.append((d * self.patches).sum(1))
            else:
                self.outputs.append(d)

    @torch.no_grad()
    def squared_norms(self) -> dict[str, Tensor]:
        """By parameter name, (B,): squared norms of each sample's gradients, summed over the passes since last time."""
        found = {}
        if self.bias:
            found[self.variables["bias"][0]] = torch.stack(self.bias).square().sum((0, 2))
        if self.scale:
            found[self.variables["weight"][0]] = torch.stack(self.scale).square().sum((0, 2))
        if self.outputs:
            found[self.variables["weight"][0]] = self._weight_norms(torch.stack(self.outputs, 2))
        for kept in (self.bias, self.scale, self.outputs):
            kept.clear()
        return found

    def _weight_norms(self, d: Tensor) -> Tensor:
        """Of (B, T, K, channels) gradients at the output."""
        groups, outputs = self.patches.shape[1], d.shape[3] // self.patches.shape[1]
        if groups == 1:
            d = d.flatten(2).unsqueeze(1)  # (B, 1, T, K O)
        else:
            d = d.unflatten(3, (groups, outputs)).permute(0, 3, 1, 2, 4).flatten(3)  # (B, G, T, K O)
        if self.gram:
            return (d @ d.mT).mul_(self.patches).sum((1, 2, 3))
        gradient = d.mT @ self.patches  # (B, G, K O, I)
        if self.derivative is not None:
            gradient = gradient.unflatten(2, (-1, outputs)).mul_(self.derivative.unsqueeze(1))
        return torch.linalg.vector_norm(gradient.flatten(1), dim=1).square()


def _positions_first(layer: nn.Module, grad: Tensor) -> Tensor:
    """(B, channels, *space), or (B, *space, channels) for a linear layer, to (B, T, channels)."""
    if isinstance(layer, nn.Linear):
        return grad.reshape(len(grad), -1, grad.shape[-1])
    return grad.movedim(1, -1).reshape(len(grad), -1, grad.shape[1])


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What each output position of a convolution or linear layer sees: (B, G, T, I).

    Within a patch the order is (kernel, channel), which is that of memory for channels-last images.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), 1, -1, x.shape[-1])
    assert isinstance(layer, _ConvNd)
    padding = layer._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, padding, mode=mode)
    space = x.ndim - 2
    for axis in range(space):
        size, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (B, channels, *positions, *kernel) to (B, *positions, *kernel, channels)
    x = x.movedim(1, -1)
    positions = math.prod(x.shape[1 : 1 + space])
    x = x.reshape(len(x), positions, -1, layer.groups, x.shape[-1] // layer.groups)
    return x.permute(0, 3, 1, 2, 4).flatten(3)


def _weight_as_patches(layer: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape, its entries in the order of `_patches`: (outputs, I)."""
    if isinstance(layer, nn.Linear):
        return weight
    return weight.movedim(1, -1).flatten(1)
