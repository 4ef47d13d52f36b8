"""The model as it will be measured; and where in it something happens."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpq_analysis.curvature import as_batches
from fpq_analysis.curvature.batches import Batch
from fpq_analysis.curvature.steps import Step, watch
from fpq_analysis.forward import ForwardFunction, with_forward
from fpq_analysis.losses import Loss, LossFunction, resolve_loss
from fpq_analysis.models import model_device, model_precision
from fpq_analysis.nests import Nest, moved, take
from fpq_analysis.quantizers import variables
from fpq_analysis.quantizers import view as take_view

OK, NOTE, FAULT = "ok", "note", "fault"
COLUMNS = ["check", "status", "finding", "cure"]
FEW = 8  # samples for everything that one would show as well


class Finding(NamedTuple):
    """What a check says: `status` ok, note or fault; a sentence; and what to do about it."""

    status: str
    finding: str
    cure: str = ""


@dataclass
class ModelUnderTest:
    """A plain copy of a model in eval mode, with data on its device."""

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
        return take(self.data[0], slice(FEW))

    def few_loss(self) -> Tensor:
        return self.loss(self.model(self.few[0]), self.few[1])

    def gradients(self) -> dict[str, Tensor | None]:
        """Of `few_loss`, by name; None for a parameter it does not use."""
        found = torch.autograd.grad(self.few_loss(), list(self.variables.values()), allow_unused=True)
        return dict(zip(self.variables, found, strict=True))

    @torch.no_grad()
    def steps(self, x: Nest) -> list[Step]:
        return watch(self.model, lambda: self.model(x))[1]

    def random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    @cached_property
    def precise(self) -> ModelUnderTest:
        """The same in float64 on few samples; as it is, where the model or the device does not know float64."""
        with suppress(RuntimeError, TypeError):
            few = moved(self.few, self.device, torch.float64)
            found = replace(self, model=copy.deepcopy(self.model).double(), data=[few])
            if found.few_loss().dtype == torch.float64:
                return found
        return replace(self, data=[self.few])


def prepare(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    loss: str | LossFunction,
    device: str | torch.device | None,
    seed: int,
    forward: ForwardFunction | None = None,
) -> ModelUnderTest:
    """Copy the model as `dequantized` to `device` (None: where it is), and the data.

    Raises:
        UserError: if there are no data, or the loss has an unknown name.
    """
    where = torch.device(device) if device is not None else model_device(model)
    copied = take_view(with_forward(model, forward), "dequantized").to(where)
    dtype = model_precision(copied)
    data = [(moved(x, where, dtype), moved(y, where)) for x, y in as_batches(batches)]
    bound = resolve_loss(loss).for_targets(y for _, y in data)
    return ModelUnderTest(copied, data, bound, where, torch.Generator().manual_seed(seed))


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Inside, random numbers may be drawn and gradients taken; after, it was nothing."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        yield


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


def first(found: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def short(error: Exception) -> str:
    """An error in half a line."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:120].rstrip('.')}"
