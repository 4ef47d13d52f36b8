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

from fpq_analysis.quantizers import in_eval_mode

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


class Folded(ByHand):
    """`latent`, a BatchNorm's slope folded into the weight ahead of rounding, and divided by behind: as torch.ao does.

    Args:
        moving: differentiate the slope within the rounded weight, too; else it is a part of the step, a constant.
    """

    def __init__(self, pair: Pair, moving: bool) -> None:
        super().__init__(pair, "latent")
        self.moving = moving

    def forward(self, x: Tensor) -> Tensor:
        def used(name: str) -> Tensor:
            p, grid = self.named[name], self.pair.weights.get(name)
            slope = self.named.get(name.replace(".weight", ".bn.weight"))
            if grid is None or slope is None:
                return p if grid is None else grid.straight_through(p)
            # Q(w c) / c for a slope of c times what it is now, which is one
            c = (slope / slope.detach()).view(-1, 1, 1, 1)
            return grid.straight_through(p * c) / c if self.moving else grid.straight_through(p)

        return self.pair.run(used, lambda name, x: self.pair.activations[name].straight_through(x), x)


# --- torch.ao ---


class Net(nn.Module):
    """Convolutions with and without BatchNorm, fused with their ReLU; a residual sum; a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = ao.QuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(3, 2, 3, padding=1), nn.ReLU()
        self.conv3, self.bn3 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.fc = nn.Linear(32, 3)
        nn.init.constant_(self.conv2.bias, 0.5)  # so that no layer is dead

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


def torch_ao(qconfig: Any = None, share: float = 0.5, swap: Any = None, wide: float = 1.0) -> Pair:
    """Eager mode, layers fused; a few steps of training; then the weights' ranges are narrowed to clip that share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = ao.fuse_modules_qat(Net().train(), FUSED)
        with torch.no_grad():
            model.fc.weight.mul_(wide)
        model.qconfig = qconfig or ao.get_default_qat_qconfig("fbgemm")
        ao.prepare_qat(model, inplace=True)
        for layer in (model.conv1, model.conv2, model.conv3, model.fc) if swap else ():
            layer.weight_fake_quant = swap(n=len(layer.weight))
        _train(model)
        for module in model.modules():
            if hasattr(module, "enable_param_learning"):
                module.enable_param_learning()
        return _pair_of_net(model, share, lambda name: model.get_submodule(name).activation_post_process)


def _train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    model(X)  # learned scales are as observed again
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


def torch_ao_fx() -> Pair:
    """By FX, where activations are quantized by modules of the graph."""
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = Net()
        net.quant = nn.Identity()
        model = prepare_qat_fx(net.train(), ao.get_default_qat_qconfig_mapping("fbgemm"), (X,))
        _train(model)
        # What the graph rounds: the input, which the identity leaves as it is; after each layer; after flattening.
        places = {"quant": 0, "conv1": 2, "conv2": 3, "conv3": 4, "fc": 6}
        model.activation_post_process_5.disable_fake_quant()  # flattened values are rounded already
        return _pair_of_net(model, 0.5, lambda name: model.get_submodule(f"activation_post_process_{places[name]}"))


def torch_ao_learnable() -> Pair:
    """LSQ's quantizers, which have no second derivative of their own, scales by channel and for a whole tensor."""
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize as Learnable

    def of_weight(**more: Any) -> Any:
        observer = ao.MovingAveragePerChannelMinMaxObserver
        constants = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
        return Learnable(observer=observer, quant_min=-8, quant_max=7, channel_len=more["n"], **constants)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_input = Learnable.with_args(observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        default = ao.get_default_qat_qconfig("fbgemm")
        return torch_ao(ao.QConfig(activation=of_input, weight=default.weight), swap=of_weight)


def torch_ao_plain() -> Pair:
    """The quantizer that is not fused with its observer, with one scale a tensor and a zero point."""
    weight = ao.FakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver,
        quant_min=0,
        quant_max=15,
        dtype=torch.quint8,
        qscheme=torch.per_tensor_affine,
    )
    return torch_ao(ao.QConfig(activation=ao.default_fake_quant, weight=weight))


# --- torchao and Brevitas ---


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 3))


def _run_mlp(used: Any, rounded: Any, x: Tensor) -> Tensor:
    x = F.linear(rounded("1", x.flatten(1)), used("1.weight"), used("1.bias")).relu()
    return F.linear(rounded("3", x), used("3.weight"), used("3.bias"))


class Clamped(Grid):
    """The gradient is that of `torch.clamp`, at the bounds, too, where it depends on torch's version."""

    def straight_through(self, x: Tensor) -> Tensor:
        ratio = x / self.scale
        q = ratio + (ratio.round() - ratio).detach() + self.zero
        return (q.clamp(self.low, self.high) - self.zero) * self.scale


class ByToken(Grid):
    """Asymmetric 8-bit quantization with the range of each row, as torchao has it for activations."""

    def __init__(self) -> None:
        super().__init__(None, None, -128, 127)

    def straight_through(self, x: Tensor) -> Tensor:
        low, high = x.detach().amin(1, keepdim=True).clamp(max=0), x.detach().amax(1, keepdim=True).clamp(min=0)
        scale = ((high.float() - low.float()) / 255).clamp(min=torch.finfo(torch.float32).eps)
        zero = (self.low - (low.float() / scale).round()).clamp(self.low, self.high)
        return Clamped(scale.double(), zero.double(), self.low, self.high).straight_through(x)


def torchao(learned: bool = False) -> Pair:
    """4-bit weights by groups of three, or with learned scales a row; activations token by token."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers

    model = _mlp()
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    if learned:
        more: dict[str, Any] = {"granularity": "per_channel", "is_dynamic": False, "range_learning": True}
        more |= {"scale_precision": torch.float32, "zero_point_precision": torch.float32}
    else:
        more = {"group_size": 3, "is_dynamic": False}
    weights = IntxFakeQuantizeConfig(torch.int4, **more)
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    if learned:
        initialize_fake_quantizers(model, (X,))
    model(X)
    grids = {}
    for name in ("1", "3"):
        layer = model.get_submodule(name)
        quantizer = layer.weight_fake_quantizer
        with torch.no_grad():
            rows = layer.weight.abs().reshape(quantizer.scale.numel(), -1)
            narrow = (rows.median(1).values / 8).view_as(quantizer.scale)
            quantizer.scale.data.copy_(narrow)
        scale = quantizer.scale.detach().double()
        grids[f"{name}.weight"] = Clamped(scale.repeat_interleave(layer.in_features // scale.shape[1], 1), 0.0, -8, 7)
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if "quantizer" not in n}
    return Pair(model.eval(), tensors, grids, {"1": ByToken(), "3": ByToken()}, _run_mlp)


class Average(Grid):
    """Brevitas' weights on 4 bits with the mean magnitude of each row as the range, differentiated through."""

    def __init__(self) -> None:
        super().__init__(None, 0.0, -7, 7)

    def _grid(self, x: Tensor) -> Grid:
        return Grid(x.abs().mean(1, keepdim=True) / 7, 0.0, -7, 7)

    def value(self, x: Tensor) -> Tensor:
        return self._grid(x).value(x)

    def inside(self, x: Tensor) -> Tensor:
        return self._grid(x).inside(x)

    def straight_through(self, x: Tensor) -> Tensor:
        scale = self._grid(x).scale
        ratio = x / scale
        return (ratio.round().clamp(-7, 7).detach() + ratio - ratio.detach()) * scale


def brevitas() -> Pair:
    """Weights that half of are beyond the range; the gradient passes the clip, and the scale."""
    from brevitas import nn as qnn
    from brevitas.inject.enum import StatsOp
    from brevitas.quant import Int8WeightPerChannelFloat

    class OfWeights(Int8WeightPerChannelFloat):
        bit_width = 4
        scaling_stats_op = StatsOp.AVE

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        qnn.QuantIdentity(bit_width=8, return_quant_tensor=True),
        qnn.QuantLinear(36, 6, True, weight_quant=OfWeights),
        qnn.QuantReLU(bit_width=4),
        qnn.QuantLinear(6, 3, True, weight_quant=OfWeights),
    )
    model.train()(X)
    model.eval()(X)
    double = copy.deepcopy(model).double()
    scales = {name: double.get_submodule(name).act_quant.scale().detach() for name in ("1", "3")}
    activations = {"1": Grid(scales["1"], 0.0, -128, 127), "3": Grid(scales["3"], 0.0, 0, 15)}
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if "quant" not in n}

    def run(used: Any, rounded: Any, x: Tensor) -> Tensor:
        x = F.linear(rounded("1", x.flatten(1)), used("2.weight"), used("2.bias")).relu()
        return F.linear(rounded("3", x), used("4.weight"), used("4.bias"))

    return Pair(model, tensors, {f"{name}.weight": Average() for name in ("2", "4")}, activations, run)


# --- ModelOpt and pt2e ---


def modelopt() -> Pair:
    """4-bit weights by row, half of them beyond the maximum; 8-bit inputs of one scale."""
    import modelopt.torch.quantization as mtq

    config = {
        "quant_cfg": {
            "*weight_quantizer": {"num_bits": 4, "axis": 0, "pass_through_bwd": False},
            "*input_quantizer": {"num_bits": 8, "axis": None},
        },
        "algorithm": "max",
    }
    model = mtq.quantize(_mlp(), config, lambda m: m(X)).eval()
    weights, activations = {}, {}
    for name in ("1", "3"):
        layer = model.get_submodule(name)
        amax = layer.weight.detach().abs().median(1, keepdim=True).values
        layer.weight_quantizer.amax = amax
        weights[f"{name}.weight"] = Bounded(amax.double(), 7)
        activations[name] = Bounded(layer.input_quantizer.amax.detach().double(), 127)
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if "quantizer" not in n}
    return Pair(model, tensors, weights, activations, _run_mlp)


class Bounded(Grid):
    """ModelOpt's: symmetric, its gradient that of values within the maximum."""

    def __init__(self, maximum: Tensor, high: int) -> None:
        super().__init__(maximum / high, 0.0, -high - 1, high)
        self.__dict__["maximum"] = maximum

    def inside(self, x: Tensor) -> Tensor:
        return x.abs() <= self.__dict__["maximum"]


def pt2e(batch_norm: bool = False) -> Pair:
    """A graph, 2-bit weights of which half are beyond the range, inputs of 4 bits; no modules but the quantizers.

    With a BatchNorm behind a convolution, the graph rounds the weight times the BatchNorm's slope.
    """
    from torch.fx import Node
    from torchao.quantization.pt2e import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    affine = torch.per_tensor_affine
    rounded = torch.ops.aten.linear.default, torch.ops.aten.conv2d.default

    class EveryLayer(Quantizer):
        def annotate(self, model: Any) -> Any:
            weight = QuantizationSpec(torch.int8, FakeQuantize.with_args(observer=MinMaxObserver), -2, 1, affine)
            inputs = QuantizationSpec(
                torch.uint8, FakeQuantize.with_args(observer=MovingAverageMinMaxObserver), 0, 15, affine
            )
            for node in model.graph.nodes:
                if node.target in rounded:
                    places: dict[Node, Any] = {node.args[0]: inputs, node.args[1]: weight}
                    node.meta["quantization_annotation"] = QuantizationAnnotation(places, _annotated=True)
            return model

        def validate(self, model: Any) -> None:
            pass

    dynamic = {"input": {0: torch.export.Dim.DYNAMIC}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = _conv_net() if batch_norm else _mlp()
        model = prepare_qat_pt2e(torch.export.export(net.train(), (X,), dynamic_shapes=dynamic).module(), EveryLayer())
        model(X)
    weights, activations, constants, factors = {}, {}, {}, {}
    if batch_norm:
        with torch.no_grad():
            bn = model.get_submodule("1")
            bn.weight[1] *= -1
            mean, deviation = bn.running_mean.double(), (bn.running_var.double() + 1e-5).sqrt()
            constants = {"mean": mean.view(1, -1, 1, 1), "deviation": deviation.view(1, -1, 1, 1)}
            factors["0.weight"] = (bn.weight.double() / deviation).view(-1, 1, 1, 1)
    for node in model.graph.nodes:
        if node.target in rounded:
            source = node.args[1].args[0]
            name = (source if source.op == "get_attr" else source.args[0]).target
            of_input, of_weight = (model.get_submodule(node.args[i].target) for i in (0, 1))
            factor = factors.get(name)
            scaled = model.get_parameter(name).detach() * (1 if factor is None else factor.float())
            limit = 0.7 * float(scaled.abs().median())
            of_weight.activation_post_process.min_val.fill_(-limit)
            of_weight.activation_post_process.max_val.fill_(limit)
            scale, zero = of_weight.activation_post_process.calculate_qparams()
            of_weight.scale.copy_(scale), of_weight.zero_point.copy_(zero)
            for fq in (of_input, of_weight):
                fq.disable_observer()
            weights[name] = _grid_of(of_weight, 4 if batch_norm else 0, factor)
            activations[name.removesuffix(".weight")] = _grid_of(of_input)
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}

    def run_conv_net(used: Any, rounded: Any, x: Tensor) -> Tensor:
        x = F.conv2d(rounded("0", x), used("0.weight"))
        x = (x - constants["mean"]) / constants["deviation"] * used("1.weight").view(1, -1, 1, 1)
        x = (x + used("1.bias").view(1, -1, 1, 1)).relu()
        return F.linear(rounded("4", x.flatten(1)), used("4.weight"), used("4.bias"))

    run = run_conv_net if batch_norm else _run_mlp
    return Pair(in_eval_mode(model), tensors, weights, activations, run)


def _conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
