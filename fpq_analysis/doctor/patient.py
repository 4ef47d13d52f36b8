"""The model as it will be measured; and where in it something happens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fpq_analysis.curvature import as_batches
from fpq_analysis.curvature.batches import Batch
from fpq_analysis.curvature.operator import Loss
from fpq_analysis.errors import UserError
from fpq_analysis.models import model_device
from fpq_analysis.quantizers import variables
from fpq_analysis.quantizers import view as take_view

OK, NOTE, FAULT = "ok", "note", "fault"
COLUMNS = ["check", "status", "finding", "cure"]
FEW = 8  # images for everything that one image would show as well


class Finding(NamedTuple):
    """What a check says: `status` ok, note or fault; a sentence; and what to do about it."""

    status: str
    finding: str
    cure: str = ""


@dataclass
class Patient:
    """A plain copy of a model in eval mode, with data on its device; `loss` is `F.cross_entropy` if it is that."""

    model: nn.Module
    data: list[Batch]
    loss: Loss
    device: torch.device
    generator: torch.Generator

    @cached_property
    def variables(self) -> dict[str, Tensor]:
        return variables(self.model)

    @property
    def few(self) -> Batch:
        x, y = self.data[0]
        return x[:FEW], y[:FEW]

    def few_loss(self) -> Tensor:
        return self.loss(self.model(self.few[0]), self.few[1])

    def gradients(self) -> dict[str, Tensor | None]:
        """Of `few_loss`, by name; None for a parameter it does not use."""
        found = torch.autograd.grad(self.few_loss(), list(self.variables.values()), allow_unused=True)
        return dict(zip(self.variables, found, strict=True))

    @torch.no_grad()
    def steps(self, x: Tensor) -> list[Step]:
        return watch(self.model, lambda: self.model(x))[1]

    def random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    @cached_property
    def precise(self) -> Patient:
        """The same in float64 on few images; as it is, where the model or the device does not know float64."""
        with suppress(RuntimeError, TypeError):
            x, y = (t.double() if t.is_floating_point() else t for t in self.few)
            found = replace(self, model=copy.deepcopy(self.model).double(), data=[(x, y)])
            if found.few_loss().dtype == torch.float64:
                return found
        return replace(self, data=[self.few])


def admit(
    model: nn.Module, batches: Batch | Iterable[Batch], loss: str | Loss, device: str | torch.device | None, seed: int
) -> Patient:
    """Copy the model as `dequantized` to `device` (None: where it is), and the data.

    Raises:
        UserError: if there are no data, or the loss has an unknown name.
    """
    if isinstance(loss, str) and loss != "cross_entropy":
        raise UserError(f"Unknown loss '{loss}'. Give 'cross_entropy', or a function (outputs, targets) to the mean.")
    plain = isinstance(loss, nn.CrossEntropyLoss) and repr(loss.__dict__) == repr(nn.CrossEntropyLoss().__dict__)
    function = F.cross_entropy if plain or isinstance(loss, str) else loss
    where = torch.device(device) if device is not None else model_device(model)
    data = [(x.to(where), y.to(where)) for x, y in as_batches(batches)]
    copied = take_view(model, "dequantized").to(where)
    return Patient(copied, data, function, where, torch.Generator().manual_seed(seed))


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Inside, random numbers may be drawn and gradients taken; after, it was nothing."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        yield


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

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, args: starts.append(_clock())))
        handles.append(module.register_forward_hook(finish(name)))
    try:
        return run(), steps
    finally:
        for handle in handles:
            handle.remove()


def _clock() -> int:
    """The number of a node made now."""
    with torch.enable_grad():  # checkpointing switches it off
        return torch.zeros((), requires_grad=True).clone().grad_fn._sequence_nr()  # type: ignore[union-attr]


def owner(steps: list[Step], node: Any) -> str:
    """The innermost module in whose call the node was made."""
    around = [(s.end - s.start, s.label) for s in steps if s.start < node._sequence_nr() < s.end]
    return min(around)[1] if around else "the loss"


def nodes(loss: Tensor) -> list[Any]:
    """Every node of the graph behind `loss`."""
    found: dict[Any, None] = {}
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = None
            todo.extend(following for following, _ in node.next_functions)
    return list(found)


def label(name: str, module: nn.Module) -> str:
    """How a module is named in findings."""
    return f"'{name or '(model)'}' ({type(module).__name__})"


def first(found: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def short(error: Exception) -> str:
    """An error in half a line."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:120].rstrip('.')}"
