"""The calls of a model's modules in a forward pass, to say where in it something happens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Step(NamedTuple):
    """One call of a module: its first output, a copy of it made at the time, and the in-place writes to it by then.

    Autograd numbers its nodes as it makes them; those made in the call lie between `start` and `end`.
    """

    label: str
    start: int
    end: int
    output: Tensor
    value: Tensor
    version: int


def watch(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, list[Step]]:
    """What `run` returns, and the calls of modules in it as they finish, inner before outer."""
    steps: list[Step] = []
    starts: list[int] = []

    def finish(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            start, tensors = starts.pop(), [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            for t in tensors[:1]:
                steps.append(Step(label(name, module), start, _clock(), t, t.detach().clone(), t._version))

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(lambda module, args: starts.append(_clock())))
            hooks.enter_context(module.register_forward_hook(finish(name)))
        return run(), steps


def _clock() -> int:
    """The number of a node made now."""
    with torch.enable_grad():  # checkpointing switches it off
        return torch.zeros((), requires_grad=True).clone().grad_fn._sequence_nr()  # type: ignore[union-attr]


def first_difference(steps: list[Step], others: list[Step], tolerance: float) -> str:
    """The first module whose outputs are not the same to `tolerance`, or nothing; `others` may have seen fewer samples.

    Args:
        tolerance: of the length of the difference, relative to that of the output.
    """
    pairs = zip(steps, others, strict=False)
    return next(
        (a.label for a, b in pairs if differ(a.value[tuple(map(slice, b.value.shape[:1]))], b.value, tolerance)), ""
    )


def differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether they are not the same to `tolerance`, relative to the length of `a`."""
    return a.shape != b.shape or bool((_wide(a) - _wide(b)).norm() > tolerance * _wide(a).norm())


def label(name: str, module: nn.Module) -> str:
    """How a module is named in findings."""
    return f"'{name or '(model)'}' ({type(module).__name__})"


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
