"""Float networks for small images: ResNet-18, -20 and -50, MobileNetV1 and V2; and building a user's own.

All of them take any number of classes and input channels, and images from 8x8 up.  Activations are separate, named,
out-of-place modules, so that a hook on any layer sees exactly that layer's output.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.choices import check_model_name
from fpq_analysis.errors import UserError
from fpq_analysis.references import find, where


def _convolution(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the image's size but for the stride, and its BatchNorm."""
    return [nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out)]


class PadShortcut(nn.Module):
    """Parameter-free shortcut (He et al. 2016, option A): stride by slicing, widen with zero channels."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra_channels // 2
        after = self.extra_channels - before
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual sum (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, c_in: int, c_out: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(c_in, c_out, 3, stride)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = _convolution(c_out, c_out, 3)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            narrow = PadShortcut(c_out - c_in, stride)
            self.shortcut = nn.Sequential(*_convolution(c_in, c_out, 1, stride)) if projection else narrow

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and a fourfold 1x1 convolution with a residual sum; the stride is at the 3x3, as torchvision has it."""

    EXPANSION = 4

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = width * self.EXPANSION
        self.conv1, self.bn1 = _convolution(c_in, width, 1)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = _convolution(width, width, 3, stride)
        self.relu2 = nn.ReLU()
        self.conv3, self.bn3 = _convolution(width, c_out, 1)
        self.relu3 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(*_convolution(c_in, c_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.relu3(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet with a 3x3 stem and no max-pooling, for 32x32 images.

    Args:
        blocks: number of blocks in each stage.
        widths: channels of each stage; every stage but the first halves the resolution.
        projection: 1x1 convolutions on widening shortcuts (ResNet-18); otherwise zero padding (ResNet-20).
        bottleneck: blocks of three convolutions with four times the channels of the stage (ResNet-50).
    """

    def __init__(
        self,
        blocks: list[int],
        widths: list[int],
        projection: bool,
        num_classes: int = 10,
        in_channels: int = 3,
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(in_channels, widths[0], 3)
        self.relu = nn.ReLU()
        stages: list[nn.Sequential] = []
        c_in = widths[0]
        for stage, (n, width) in enumerate(zip(blocks, widths, strict=True)):
            stages.append(nn.Sequential())
            for i in range(n):
                stride = 2 if stage > 0 and i == 0 else 1
                block = Bottleneck(c_in, width, stride) if bottleneck else BasicBlock(c_in, width, stride, projection)
                stages[-1].append(block)
                c_in = width * Bottleneck.EXPANSION if bottleneck else width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


class MobileNet(nn.Module):
    """Features, their mean over the image, and a linear layer."""

    def __init__(self, features: list[nn.Module], width: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


class MobileNetV1(MobileNet):
    """MobileNetV1 (Howard et al. 2017, arXiv:1704.04861), the stem's stride taken off for 32x32 images.

    3.2 M parameters at 10 classes.
    """

    # output channels and stride of each pair of a depthwise 3x3 and a pointwise 1x1 convolution
    PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        layers = [*_convolution(in_channels, 32, 3), nn.ReLU()]
        c_in = 32
        for c_out, stride in self.PAIRS:
            layers += [*_convolution(c_in, c_in, 3, stride, groups=c_in), nn.ReLU()]
            layers += [*_convolution(c_in, c_out, 1), nn.ReLU()]
            c_in = c_out
        super().__init__(layers, c_in, num_classes)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = c_in * expand
        layers = [*_convolution(c_in, hidden, 1), nn.ReLU6()] if expand != 1 else []
        layers += [*_convolution(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        self.layers = nn.Sequential(*layers, *_convolution(hidden, c_out, 1))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(MobileNet):
    """MobileNetV2 with the strides usual for 32x32 images: stem and second stage keep the resolution.

    2.3 M parameters at 10 classes.
    """

    # expansion, output channels, blocks, stride of the first block
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        layers = [*_convolution(in_channels, 32, 3), nn.ReLU6()]
        c_in = 32
        for expand, c_out, n, first_stride in self.STAGES:
            for i in range(n):
                layers.append(InvertedResidual(c_in, c_out, first_stride if i == 0 else 1, expand))
                c_in = c_out
        super().__init__([*layers, *_convolution(c_in, 1280, 1), nn.ReLU6()], 1280, num_classes)


def resnet18(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18 with a 3x3 stem: 11.17 M parameters at 10 classes."""
    return ResNet([2, 2, 2, 2], [64, 128, 256, 512], True, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-20 of He et al. 2016, section 4.2: 0.27 M parameters."""
    return ResNet([3, 3, 3], [16, 32, 64], False, num_classes, in_channels)


def resnet50(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-50 with a 3x3 stem: 23.5 M parameters at 10 classes."""
    return ResNet([3, 4, 6, 3], [64, 128, 256, 512], True, num_classes, in_channels, bottleneck=True)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
}


def build_model(name: str, num_classes: int, in_channels: int, *, allow_import: bool = True) -> nn.Module:
    """Build the float network `name`: one of `MODELS`, or a user's own `package.module:factory`.

    The factory is given `num_classes` and `in_channels` if it takes them.

    Args:
        allow_import: whether `package.module:factory` may be imported.  False when the name comes out of a file: a
            checkpoint must not choose which code runs.

    Raises:
        UserError: if the name is unknown, cannot be imported, or does not give an `nn.Module`.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, in_channels=in_channels)
    if not allow_import:
        check_model_name(name)
        raise UserError(
            f"The checkpoint was made with the user's own model '{name}', and code named by a file is not run. "
            f"If you trust that module, say so: --model {name}"
        )
    return call_factory(find_factory(name), name, num_classes, in_channels)


def find_factory(name: str) -> Callable[..., Any]:
    """One of `MODELS`, or the function or class that `package.module:factory` names; its module is imported.

    Raises:
        UserError: if the name is unknown, or cannot be imported.
    """
    check_model_name(name)
    if name in MODELS:
        return MODELS[name]
    return find(name, "model")


def call_factory(factory: Callable[..., Any], name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """The network that `factory` returns, given `num_classes` and `in_channels` if it takes them and they are known.

    A factory with `**kwargs` is given both, and called again without a keyword that is refused further down:
    torchvision's accept `num_classes` only, which their signatures do not show.

    Raises:
        UserError: if it fails, or gives no `nn.Module`.
    """
    try:
        taken = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"'{name}' is not a function or class that makes a model.") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    wanted = {"num_classes": num_classes, "in_channels": in_channels}
    given = {k: v for k, v in wanted.items() if v is not None and (takes_any or k in taken)}
    while True:
        try:
            with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():  # stdout is for numbers
                warnings.simplefilter("once", UserWarning)  # and not again for each checkpoint
                model = factory(**given)
            break
        except (Exception, SystemExit) as error:  # the user's code: anything can happen
            refused = [k for k in given if k not in taken and _refuses(error, k)]
            if refused:
                del given[refused[0]]
                continue
            raise UserError(
                f"'{name}' called with {given or 'no arguments'} failed: {type(error).__name__}: {error}{where(error)}."
                " It must give the network when called with those of num_classes and in_channels that it takes."
            ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"'{name}' gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _refuses(error: BaseException, keyword: str) -> bool:
    """Whether Python itself refused this keyword; any other error of the user's code must be shown."""
    return isinstance(error, TypeError) and f"got an unexpected keyword argument '{keyword}'" in str(error)


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU for a model that has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def model_precision(model: nn.Module) -> torch.dtype | None:
    """Type of the model's floating-point parameters; None where they are of several types, or there is none."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else None
