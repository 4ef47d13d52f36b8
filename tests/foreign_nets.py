"""Quantized networks of other programs, and beside each the same written by hand: Q(w) in plain tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization as ao
from torch import Tensor, nn
from torch.nn import functional as F

X = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(12) % 3


@dataclass(frozen=True)
class Grid:
    """A quantizer's constants; each a number or a tensor that broadcasts."""

    scale: Any
    zero: Any
    low: int
    high: int

    def value(self, x: Tensor) -> Tensor:
        return (((x / self.scale).round() + self.zero).clamp(self.low, self.high) - self.zero) * self.scale

    def inside(self, x: Tensor) -> Tensor:
        q = (x / self.scale).round() + self.zero
        return (q >= self.low) & (q <= self.high)

    def straight_through(self, x: Tensor) -> Tensor:
        return self.value(x).detach() + self.inside(x).to(x) * (x - x.detach())


@dataclass
class Pair:
    """A network of another program, and all that it takes to write it by hand.

    `run(used, rounded, x)` is the forward pass: `used(name)` is a parameter as the network uses it, `rounded(name, x)`
    an activation behind its quantizer.
    """

    model: nn.Module
    tensors: dict[str, Tensor]
    weights: dict[str, Any]
    activations: dict[str, Any]
    run: Callable[..., Tensor]

    def by_hand(self, definition: str) -> ByHand:
        return ByHand(self, definition)


class ByHand(nn.Module):
    """In float64; its parameters are those of the definition."""

    def __init__(self, pair: Pair, definition: str) -> None:
        super().__init__()
        self.pair, self.definition = pair, definition
        self.named: dict[str, nn.Parameter] = {}
        for name, tensor in pair.tensors.items():
            value = tensor.detach().double().clone()
            if definition == "dequantized" and name in pair.weights:
                value = pair.weights[name].value(value).detach()
            self.named[name] = nn.Parameter(value)
            self.register_parameter(name.replace(".", "_"), self.named[name])

    def forward(self, x: Tensor) -> Tensor:
        def used(name: str) -> Tensor:
            p = self.named[name]
            latent = self.definition == "latent" and name in self.pair.weights
            return self.pair.weights[name].straight_through(p) if latent else p

        def rounded(name: str, x: Tensor) -> Tensor:
            return x if self.definition == "float" else self.pair.activations[name].straight_through(x)

        return self.pair.run(used, rounded, x)

    def clipped_fraction(self) -> float:
        masks = [~grid.inside(self.pair.tensors[name].double()) for name, grid in self.pair.weights.items()]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


# --- torch.ao ---


class Net(nn.Module):
    """Convolutions with and without BatchNorm, fused with their ReLU; a residual sum; a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = ao.QuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.conv3, self.bn3 = nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.bn3(self.conv3(self.relu2(self.conv2(x))))
        return self.fc(x.flatten(1))


FUSED = [["conv1", "bn1", "relu1"], ["conv2", "relu2"], ["conv3", "bn3"]]


def _run_net(constants: dict[str, Tensor]) -> Callable[..., Tensor]:
    def run(used: Any, rounded: Any, x: Tensor) -> Tensor:
        def bn(name: str, x: Tensor) -> Tensor:
            mean, deviation = (constants[f"{name}.{what}"].view(1, -1, 1, 1) for what in ("mean", "deviation"))
            return (x - mean) / deviation * used(f"{name}.weight").view(1, -1, 1, 1) + used(f"{name}.bias").view(
                1, -1, 1, 1
            )

        x = F.conv2d(rounded("quant", x), used("conv1.weight"), used("conv1.bias"))
        x = rounded("conv1", bn("conv1.bn", x).relu())
        x = rounded("conv2", F.conv2d(x, used("conv2.weight"), used("conv2.bias"), padding=1).relu())
        x = rounded("conv3", bn("conv3.bn", F.conv2d(x, used("conv3.weight"), padding=1)))
        return rounded("fc", F.linear(x.flatten(1), used("fc.weight"), used("fc.bias")))

    return run


def _grid_of(fq: Any, ndim: int = 0, factor: Tensor | None = None) -> Grid:
    """From a fake quantizer's buffers, as they are after a forward pass in float32."""
    scale, zero = fq.scale.detach().double(), fq.zero_point.detach().double().round()
    if ndim and scale.numel() > 1:
        scale, zero = (t.view(-1, *[1] * (ndim - 1)) for t in (scale, zero))
    if factor is not None:
        scale = scale / factor
    return Grid(scale, zero, int(fq.activation_post_process.quant_min), int(fq.activation_post_process.quant_max))


def torch_ao(qconfig: Any = None, share: float = 0.5) -> Pair:
    """Eager mode, layers fused; a few steps of training; then the weights' ranges are narrowed to clip that share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = ao.fuse_modules_qat(Net().train(), FUSED)
        model.qconfig = qconfig or ao.get_default_qat_qconfig("fbgemm")
        ao.prepare_qat(model, inplace=True)
        _train(model)
        return _pair_of_net(model, share, lambda name: model.get_submodule(name).activation_post_process)


def _train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    model.eval().apply(ao.disable_observer)


def _pair_of_net(model: nn.Module, share: float, activation: Callable[[str], Any]) -> Pair:
    constants = {}
    with torch.no_grad():
        for name in ("conv1.bn", "conv3.bn"):
            bn = model.get_submodule(name)
            bn.weight[1] *= -1  # trained slopes can be negative
            constants[f"{name}.mean"] = bn.running_mean.double()
            constants[f"{name}.deviation"] = (bn.running_var.double() + bn.eps).sqrt()
        factors = {
            name.removesuffix(".bn.mean"): (model.get_submodule(name.removesuffix(".mean")).weight.double() / deviation)
            for name, deviation in ((n, constants[n.replace("mean", "deviation")]) for n in constants if "mean" in n)
        }
        factors = {name: f.view(-1, 1, 1, 1) for name, f in factors.items()}
        layers = ("conv1", "conv2", "conv3", "fc")
        for name in layers:
            layer = model.get_submodule(name)
            _narrow(layer.weight_fake_quant, layer.weight * factors.get(name, torch.ones(1)), share)
        model(X)  # the fused ones work their scales out
        weights = {
            f"{name}.weight": _grid_of(
                model.get_submodule(name).weight_fake_quant, model.get_submodule(name).weight.ndim, factors.get(name)
            )
            for name in layers
        }
        activations = {name: _grid_of(activation(name)) for name in ("quant", *layers)}
    tensors = {n: p for n, p in model.named_parameters() if "fake_quant" not in n and "post_process" not in n}
    return Pair(model, copy.deepcopy(tensors), weights, activations, _run_net(constants))


def _narrow(fq: Any, weight: Tensor, share: float) -> None:
    """A range that clips this share of the weight, by row if it has a scale for each."""
    rows = weight.detach().float().flatten(1) if fq.scale.numel() > 1 else weight.detach().float().reshape(1, -1)
    limit = torch.quantile(rows.abs(), 1 - share, dim=1)
    observer = fq.activation_post_process
    observer.min_val = -limit.view_as(observer.min_val)
    observer.max_val = limit.view_as(observer.max_val)
    scale, zero = observer.calculate_qparams()
    fq.scale.data.copy_(scale.view_as(fq.scale))
    fq.zero_point.data.copy_(zero.view_as(fq.zero_point))
