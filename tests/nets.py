"""Small networks for tests: one that trains, and a generator of random ones with every kind of layer."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis.losses import cross_entropy

SMOOTHED = cross_entropy(label_smoothing=0.1)  # a loss by its name

# What `run.json` says of the digits, for runs that are made up.
DIGITS = {
    "name": "digits",
    "classes": list("0123456789"),
    "channels": 1,
    "size": 8,
    "mean": [0.3],
    "std": [0.4],
    "n_train": 1442,
    "n_test": 355,
    "fingerprint": "f",
}


def tiny(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Three convolutions and a classifier: seconds to train on digits."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def smooth() -> nn.Module:
    """`tiny` with smooth activations, whose trace is an estimate."""
    return nn.Sequential(*(nn.GELU() if isinstance(layer, nn.ReLU) else layer for layer in tiny()))


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class FunctionalGelu(nn.Module):
    """A smooth activation that is in no list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class CalledTwice(nn.Module):
    """One layer used at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(F.relu(self.layer(x)))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class Borrowed(nn.Module):
    """A weight used outside its layer, linearly: every list of modules looks right."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * x @ self.layer.weight.T


class Standardized(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(), self.bias)


class Product(nn.Module):
    """Two branches multiplied: linear in each layer's parameters, so within the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 5)
        self.right = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.left(x) * self.right(x))


OUTSIDE = [
    FunctionalGelu,
    CalledTwice,
    Tied,
    Borrowed,
    lambda: nn.Sequential(Standardized(6, 5), nn.ReLU(), nn.Linear(5, 3)),
]


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Tensor]:
    """A random piecewise linear network in float64 and eval mode, with inputs and labels."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    channels, size = draw(st.sampled_from([1, 2, 3])), draw(st.integers(5, 7))
    n_classes, n = draw(st.integers(2, 10)), draw(st.integers(2, 7))
    layers: list[nn.Module] = []
    c = channels
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["plain", "strided", "dilated", "grouped", "depthwise", "residual", "same"]))
        bias = draw(st.booleans())
        if kind == "plain":
            conv, c = nn.Conv2d(c, 3, (3, 2), padding=(1, 0), bias=bias), 3
        elif kind == "strided":
            conv, c = nn.Conv2d(c, 2, 3, stride=2, padding=1, bias=bias), 2
        elif kind == "dilated":
            conv, c = nn.Conv2d(c, 2, 2, dilation=2, padding=1, bias=bias), 2
        elif kind == "grouped":
            layers.append(nn.Conv2d(c, 4, 1, bias=bias))
            conv, c = nn.Conv2d(4, 6, 2, groups=2, padding=1, bias=bias), 6
        elif kind == "depthwise":
            conv, c = nn.Conv2d(c, 2 * c, 3, groups=c, padding=1, bias=bias), 2 * c
        elif kind == "residual":
            conv = Residual(nn.Conv2d(c, c, 3, padding=1, bias=bias))
        else:
            mode = draw(st.sampled_from(["zeros", "circular", "reflect"]))
            conv, c = nn.Conv2d(c, 2, 3, padding="same", padding_mode=mode, bias=bias), 2
        layers.append(conv)
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(c))
        activation = draw(st.sampled_from([nn.ReLU, nn.ReLU6, nn.LeakyReLU]))
        layers.append(activation(inplace=draw(st.booleans())))
    layers.append(draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)])))
    layers.append(nn.Flatten())
    images = torch.randn(n, channels, size, size, dtype=torch.float64)
    features = nn.Sequential(*layers).double().eval()(images).shape[1]
    if draw(st.booleans()):
        layers += [nn.Linear(features, 5), nn.ReLU()]
        features = 5
    model = nn.Sequential(*layers, nn.Linear(features, n_classes, bias=draw(st.booleans()))).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval(), images, torch.randint(n_classes, (n,))


def dense_hessian(model: nn.Module, parameters: list[Tensor], x: Tensor, y: Any, loss: Any = F.cross_entropy) -> Tensor:
    """The whole Hessian of the mean loss by double backward, all rows at once."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in gradients])
        if not flat.requires_grad:
            return torch.zeros(len(flat), len(flat)).to(flat)
        eye = torch.eye(len(flat)).to(flat)
        rows = torch.autograd.grad(flat, parameters, eye, is_grads_batched=True, allow_unused=True)
    zeros = [flat.new_zeros(len(flat), p.numel()) for p in parameters]
    parts = [zero if row is None else row.reshape(zero.shape) for row, zero in zip(rows, zeros, strict=True)]
    return torch.cat(parts, 1).detach()
