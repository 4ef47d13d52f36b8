"""Random small networks that are piecewise linear by construction, or hide one bend somewhere; for the certificate."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 6


class Clip(torch.autograd.Function):
    """Piecewise linear, by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * ((x > -1) & (x < 2))


class Swish(torch.autograd.Function):
    """Smooth, by hand, and written in the other of torch's two ways."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * (s + x * s * (1 - s))


class SharpSoftplus(torch.autograd.Function):
    """Curved only within a thousandth of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.softplus(x, beta=1e4)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1e4 * ctx.saved_tensors[0]).sigmoid()


class FarSoftplus(torch.autograd.Function):
    """Curved only within a thousandth of seven."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.softplus(x - 7, beta=1e4)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1e4 * (ctx.saved_tensors[0] - 7)).sigmoid()


class Sly(torch.autograd.Function):
    """Smooth and in place: what autograd keeps of it on a view does not tell, and the last thing it does is linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(0.1).exp_().mul_(2)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.1 * grad * ctx.saved_tensors[0]


class Times(torch.autograd.Function):
    """The product of its two inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return grad * y, grad * x


class Op(nn.Module):
    """A function as a module, which no list of modules knows."""

    def __init__(self, function: Callable[[Tensor], Tensor], name: str = "") -> None:
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Branches(nn.Module):
    """Two linear layers, joined."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


class First(nn.Module):
    """Branches of the data, on which no variable acts before."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.both = Branches(join)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


class Twice(nn.Module):
    """One layer at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


class Squashed(nn.Module):
    """A layer with its weight used a second time, behind a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1e-6 * F.linear(x, self.layer.weight.tanh())


class Images(nn.Module):
    """A small convolutional network in the middle."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.pool = random.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d((1, 2))])
        self.act = Op(act)
        self.out = nn.LazyLinear(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.act(self.norm(self.conv(x.reshape(-1, 1, 2, 3)))))
        h = F.interpolate(F.pad(h, (1, 0, 0, 1)), scale_factor=2, mode="bilinear")
        return self.out(h.flatten(1))


def sliced(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """In place, on a part of the features."""

    def change(x: Tensor) -> Tensor:
        y = x.clone()
        function(y[:, 1:4])
        return y

    return change


def padded(x: Tensor) -> Tensor:
    """Written into zeros, as shortcuts of ResNets are."""
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def grid(x: Tensor) -> Tensor:
    """A step a tenth of each sample's largest, held."""
    s = x.detach().abs().amax(1, keepdim=True) / 10 + 1e-30
    q = x / s
    return (q + (q.round() - q).detach()).clamp(-5, 5) * s


PIECEWISE: dict[str, Callable[[], nn.Module]] = {
    name: lambda function=function, name=name: Op(function, name)
    for name, function in {
        "relu": F.relu,
        "relu_": lambda x: F.relu_(x * 1),
        "relu6": F.relu6,
        "leaky": lambda x: F.leaky_relu(x, 0.2),
        "rrelu": lambda x: F.rrelu(x, training=False),
        "threshold": lambda x: F.threshold(x, 0.1, -0.2),
        "hardtanh": F.hardtanh,
        "hardsigmoid": F.hardsigmoid,
        "hardshrink": F.hardshrink,
        "softshrink": F.softshrink,
        "prelu": lambda x: F.prelu(x, x.new_full((1,), 0.3)),
        "clamp": lambda x: x.clamp(-0.5, 3),
        "abs": torch.abs,
        "max": lambda x: torch.cat([x, x.max(1, keepdim=True)[0]], 1)[:, 1:],
        "maximum": lambda x: torch.maximum(x, 0.5 * x.flip(1)),
        "sort": lambda x: x.sort(1)[0],
        "topk": lambda x: x.topk(WIDTH - 1, 1)[0].repeat(1, 2)[:, :WIDTH],
        "median": lambda x: x - x.median(1, keepdim=True)[0],
        "cumsum": lambda x: x.cumsum(1),
        "mean": lambda x: x - x.mean(1, keepdim=True),
        "where": lambda x: torch.where(x > 0.2, x, -3 * x),
        "mask": lambda x: x * (x > 0),
        "masked_fill": lambda x: x.masked_fill(x < -1, 0.5),
        "scaled": lambda x: 2.5 * x / 3 - 1,
        "first power": lambda x: x**1,
        "constant matrix": lambda x: x @ torch.linspace(-1, 1, WIDTH**2, dtype=x.dtype).view(WIDTH, WIDTH),
        "einsum": lambda x: torch.einsum("bi,ij->bj", x, torch.eye(WIDTH, dtype=x.dtype).cumsum(0)),
        "permute": lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(-1, WIDTH).roll(1, 1),
        "gather": lambda x: x.gather(1, x.argsort(1)),
        "index": lambda x: x[:, [1, 0, 2, 2, 4, 5]],
        "unbind": lambda x: torch.stack(x.unbind(1)[::-1], 1),
        "fmod": lambda x: x.fmod(0.7),
        "cast": lambda x: x.to(torch.float32 if x.dtype == torch.float64 else torch.float64).to(x.dtype),
        "scatter": lambda x: torch.zeros_like(x).scatter_add(1, torch.zeros_like(x, dtype=torch.long), x) + x,
        "lerp": lambda x: torch.lerp(x, x.flip(1).relu(), 0.3),
        "slice relu_": sliced(lambda part: part.relu_()),
        "slice mul_": sliced(lambda part: part.mul_(-2)),
        "slice clamp_": sliced(lambda part: part.clamp_(-0.3, 0.3)),
        "padded": padded,
        "residual": lambda x: x + F.relu(x),
        "rounded": straight_through,
        "grid": grid,
        "Clip": Clip.apply,
        "detached gate": lambda x: x * torch.sigmoid(x.detach()),
        "pool": lambda x: F.avg_pool1d(x.unsqueeze(1), 3, 1, 1).squeeze(1),
        "unfold": lambda x: F.unfold(x.view(-1, 1, 2, 3), (1, 2), padding=(0, 1)).flatten(1)[:, :WIDTH],
    }.items()
} | {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.BatchNorm1d(WIDTH),
    "dropout": lambda: nn.Dropout(0.5),
    "images": lambda: Images(F.relu),
    "sum of branches": lambda: Branches(torch.add),
    "largest branch": lambda: Branches(torch.maximum),
}
AT_FIRST: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "product": lambda: First(torch.mul),
    "Times": lambda: First(Times.apply),
    "gated by data": lambda: First(lambda a, b: a * F.relu(b)),
    "bmm": lambda: First(lambda a, b: (a.unsqueeze(2) @ b.unsqueeze(1)).sum(2)),
}
BENT: dict[str, Callable[[], nn.Module]] = {
    name: lambda function=function, name=name: Op(function, name)
    for name, function in {
        "gelu": F.gelu,
        "silu": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "softplus": F.softplus,
        "rare softplus": lambda x: F.softplus(x, beta=1e4),
        "far softplus": lambda x: F.softplus(x - 7, beta=1e4),
        "elu": F.elu,
        "celu": F.celu,
        "selu": F.selu,
        "mish": F.mish,
        "hardswish": F.hardswish,
        "logsigmoid": F.logsigmoid,
        "glu": lambda x: F.glu(torch.cat([x, x.flip(1)], 1), 1),
        "square": lambda x: x**2,
        "small square": lambda x: x + 1e-8 * x * x,
        "small exp": lambda x: x + 1e-8 * x.clamp(max=1).exp(),
        "power": lambda x: (x.abs() + 1e-3) ** 1.5,
        "tensor power": lambda x: (x.abs() + 1e-3) ** torch.tensor(1.2, dtype=x.dtype),
        "sine": lambda x: torch.sin(1e-4 * x),
        "own gate": lambda x: x * F.hardsigmoid(x),
        "mixed product": lambda x: x * x.flip(1),
        "quotient": lambda x: x / (1 + x.abs()),
        "unit length": lambda x: F.normalize(x, dim=1),
        "softmax": lambda x: x.softmax(1),
        "log_softmax": lambda x: x.log_softmax(1),
        "layer_norm": lambda x: F.layer_norm(x, (WIDTH,)),
        "group_norm": lambda x: F.group_norm(x, 2),
        "deviation": lambda x: x / (x.std(1, keepdim=True) + 1),
        "logsumexp": lambda x: x + x.logsumexp(1, keepdim=True),
        "prod": lambda x: x + x[:, :2].prod(1, keepdim=True),
        "cumprod": lambda x: x.cumprod(1),
        "outer": lambda x: (x.unsqueeze(2) * x.unsqueeze(1)).sum(2),
        "attention": lambda x: F.scaled_dot_product_attention(*[x.view(-1, 2, 3)] * 3).flatten(1),
        "complex": lambda x: (x.to(torch.complex128) * (1 + 1j) + 1).abs().to(x.dtype),
        "slice exp_": sliced(lambda part: part.mul_(0.1).exp_()),
        "slice tanh_": sliced(lambda part: part.tanh_()),
        "slice own product": sliced(lambda part: part.mul_(part.clone())),
        "Swish": Swish.apply,
        "SharpSoftplus": SharpSoftplus.apply,
        "Times": lambda x: Times.apply(x, x.flip(1)),
        "FarSoftplus": FarSoftplus.apply,
        "slice Sly": sliced(Sly.apply),
        "grid of itself": lambda x: straight_through(x / (x.abs().amax(1, keepdim=True) + 1)),
        "grid sample": lambda x: F.grid_sample(
            torch.linspace(0, 1, 9, dtype=x.dtype).square().view(1, 1, 3, 3).expand(len(x), 1, 3, 3),
            0.1 * x.view(-1, 1, 3, 2),
            mode="bicubic",
            align_corners=False,
        ).flatten(1).repeat(1, 2),
    }.items()
} | {
    "called twice": Twice,
    "squashed weight": Squashed,
    "product of branches": lambda: Branches(torch.mul),
    "smooth images": lambda: Images(F.silu),
}  # fmt: skip


def network(seed: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    """A network in eval mode, inputs (7, 6), labels, and the name of what bends it or nothing.

    Half of them bend in one place, behind a layer with weights and in front of others.  Each layer's weights have a
    size of their own, from 1e-8 to 1e8, as the inputs have; half of the biases are zero.  The last layer is scaled so
    that the logits are of the order of one.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    dtype = random.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    bend = random.choice(sorted(BENT)) if random.random() < 0.5 else ""
    blocks = [AT_FIRST[random.choice(sorted(AT_FIRST))]()]
    blocks += [PIECEWISE[random.choice(sorted(PIECEWISE))]() for _ in range(random.randint(0, 4))]
    if bend:
        blocks.insert(random.randint(1, len(blocks)), BENT[bend]())
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, 3)).eval()
    x = torch.randn(7, WIDTH)
    model(x)  # the lazy layers
    wild = random.random() < 0.5
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            with torch.no_grad():
                module.weight *= 10 ** random.uniform(-8, 8) if wild else 1
                if random.random() < 0.5:
                    module.bias.zero_()
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x *= 10 ** random.uniform(-8, 8) if wild else 1
    model, x = model.double(), x.double()
    with torch.no_grad():
        size = float(model(x).abs().max())
        if 0 < size < float("inf"):
            model[-1].weight /= size
            model[-1].bias /= size
    return model.to(dtype), x.to(dtype), torch.randint(3, (7,)), bend
