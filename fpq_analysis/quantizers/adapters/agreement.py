"""Does a network that was turned into our form compute what it computed before?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fpq_analysis.errors import UserError
from fpq_analysis.forward import running
from fpq_analysis.quantizers.base import Quantizer

AGREES = 1e-5  # relative to the largest entry; some kernels hold their scales in float32
# What a rounded activation may differ by elsewhere: where values lay on a threshold, a step in a few places.
FLIPPED, PASSED_ON = 0.01, 0.05
WEIGHTED = {
    getattr(F, name)
    for of in ("conv", "conv_transpose")
    for name in (f"{of}1d", f"{of}2d", f"{of}3d")
} | {F.linear, F.embedding}  # fmt: skip


@dataclass
class _Call:
    args: Any
    kwargs: Any
    output: Any
    weights: list[Tensor]


class _Weights(TorchFunctionMode):
    """Inside, the weights of all convolutions and linear maps are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WEIGHTED:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            weight = getattr(weight, "value", weight)  # of the packages' own kinds of tensor
            self.found.append(weight.detach().clone())
        return func(*args, **kwargs)


@dataclass
class Passed:
    """One forward pass of the original: what modules got and gave, by name, in the order of execution."""

    calls: dict[str, list[_Call]]
    output: Any

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, names: list[str], inputs: Any) -> Passed:
        """Run `model` and watch the modules of these names."""
        calls: dict[str, list[_Call]] = {}
        modules = dict(model.named_modules())
        with ExitStack() as stack, _Weights() as weights:
            begun: dict[str, list[Any]] = {}

            def before(name: str) -> Any:
                def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                    begun.setdefault(name, []).append((*_copied((args, kwargs)), len(weights.found)))

                return hook

            def after(name: str) -> Any:
                def hook(module: nn.Module, args: Any, output: Any) -> None:
                    given, named, start = begun[name].pop()
                    call = _Call(given, named, _copied(output), weights.found[start:])
                    calls.setdefault(name, []).append(call)

                return hook

            for name in names:
                module = modules[name]
                stack.enter_context(module.register_forward_pre_hook(before(name), prepend=True, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(after(name)))
            return cls(calls, _copied(model(fitted(inputs, model))))


@torch.no_grad()
def check_agreement(original: nn.Module, names: list[str], adopted: nn.Module, inputs: Any) -> None:
    """Raise `UserError` unless `adopted`, and each module of these names on its own, computes what `original` does."""
    with running(inputs):
        before = Passed.of(original, names, inputs)
    theirs, modules = dict(original.named_modules()), dict(adopted.named_modules())
    for name, calls in before.calls.items():
        for call in calls if name in modules else ():
            with _Weights() as weights, _failing(f"'{name}'"):
                output = modules[name](*_copied(call.args), **_copied(call.kwargs))
            _check_weights(name, modules[name], call.weights, weights.found)
            steps = [q.step_size for q in modules[name].children() if isinstance(q, Quantizer)]
            largest = max((float(step.max()) for step in steps if step.numel()), default=0.0)
            _check(f"what '{name}' puts out", call.output, output, largest, FLIPPED)
            _check_gradients(name, theirs[name], modules[name], call)
    rounds = any(isinstance(module, Quantizer) for module in modules.values())
    with _failing("the network"):
        output = adopted(fitted(inputs, adopted))
    for was, now in zip(tree_leaves(_plain(before.output)), tree_leaves(_plain(output)), strict=True):
        if isinstance(was, Tensor):
            _check("the outputs", was, now, PASSED_ON * float(was.abs().max()) if rounds else 0.0, 1.0)


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Inside, any error becomes a `UserError` that names `what`."""
    try:
        yield
    except Exception as error:  # of what the user's adapter made
        raise UserError(f"What the adapter makes of {what} fails: {type(error).__name__}: {error}.") from error


def _check_gradients(name: str, theirs: nn.Module, ours: nn.Module, call: _Call) -> None:
    """Where gradients pass and where not, as far as the original has some.

    A scale that is worked out from a weight may be differentiated there, and is a constant here: an entry that is the
    largest of its scale may be off where the gradient passes in both, and all may a little.
    """
    try:
        was = _gradients(theirs, call)
    except Exception:  # not made for that: no second derivative is measured of it
        return
    now = _gradients(ours, call)
    for where in was.keys() & now.keys():
        large = torch.maximum(was[where].abs(), now[where].abs())
        off = ((was[where] - now[where]).abs() > large / 2) & (large > large.square().mean().sqrt() / 3)
        allowed = 1 + FLIPPED * off.numel()
        if where == "weight":
            off, allowed = off & ~(_largest(ours) & (was[where] != 0) & (now[where] != 0)), 0
        if int(off.sum()) > allowed:
            raise UserError(
                f"The adapter disagrees with the backward pass: '{name}' passes a gradient to its {where} where the "
                f"adapter's quantizer does not, or the other way round ({float(off.double().mean()):.1%} of the "
                "entries). Give a quantizer with the same straight-through gradient: docs/quantizers/own.md."
            )


def _largest(layer: nn.Module) -> Tensor:
    """Which entries of a quantized weight are the largest of their scale."""
    weight: Any = next(
        p for name, p in layer.named_parameters() if name.endswith("weight.original") or name == "weight"
    )
    largest = weight.abs()
    for q in layer.modules():
        if isinstance(q, Quantizer) and q.step_size.numel() > 1 and q.step_size.ndim == weight.ndim:
            axes = [axis for axis, size in enumerate(q.step_size.shape) if size == 1]
            return largest == largest.amax(axes, keepdim=True)
    return largest == largest.max()


@torch.enable_grad()
def _gradients(module: nn.Module, call: _Call) -> dict[str, Tensor]:
    """Of a random projection of the output, in the first input and in the weight."""
    args = _copied(call.args)
    leaves = {"input": args[0].detach().requires_grad_()} if args and isinstance(args[0], Tensor) else {}
    for name, p in module.named_parameters():
        if name in ("weight", "parametrizations.weight.original"):
            leaves["weight"] = p
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.is_floating_point() and leaf.requires_grad}
    args = (leaves["input"], *args[1:]) if "input" in leaves else args
    output = _plain(module(*args, **_copied(call.kwargs)))
    along = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    found = torch.autograd.grad(output, list(leaves.values()), along, allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def _check_weights(name: str, layer: nn.Module, were: list[Tensor], are: list[Tensor]) -> None:
    if len(were) == len(are) == 1:  # else they are not known one by one, and the outputs have to do
        folded = getattr(layer, "folded", None)
        now = are[0] if folded is None else are[0] * folded
        _check(f"the weight that '{name}' uses", were[0], now, 0.0, 0.0)


def _check(what: str, was: Any, now: Any, step: float, share: float) -> None:
    was, now = _plain(was), _plain(now)
    if not isinstance(was, Tensor) or not was.is_floating_point() or was.numel() == 0:
        return
    cure = "Write the adapter that is right for it, and register it: fpq_analysis.quantizers.adapters.register_adapter."
    if not isinstance(now, Tensor) or now.shape != was.shape:
        raise UserError(f"The adapter disagrees with the forward pass: {what} has another shape. {cure}")
    largest = float(was.abs().max())
    away = (now - was).abs()
    # Not `away > ...`, which a NaN would pass; a NaN on both sides is what the network has.
    off = ~(away <= AGREES * largest) & ~(was.isnan() & now.isnan())
    within = away[off] <= 1.01 * step + AGREES * largest
    if float(off.double().mean()) > share or not bool(within.all()):
        raise UserError(
            f"The adapter disagrees with the forward pass: {what} is not what it was, by {float(away.max()):.3g} where "
            f"the largest entry is {largest:.3g}. {cure}"
        )


def _plain(value: Any) -> Any:
    """The tensor in what some packages pass from layer to layer."""
    inner = getattr(value, "value", None)
    return inner if isinstance(inner, Tensor) else value


def _copied(tree: Any) -> Any:
    """A copy of what is passed, plain."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tree_map(_plain, tree, is_leaf=_is_wrapped))


def _is_wrapped(value: Any) -> bool:
    return _plain(value) is not value


def fitted(inputs: Any, model: nn.Module) -> Any:
    """`inputs` on the model's device, floating-point ones in its precision."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def move(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.to(like) if t.is_floating_point() else t.to(like.device)

    return tree_map(move, inputs)
