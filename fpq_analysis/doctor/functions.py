"""Custom `autograd.Function`s, one by one: is what autograd takes for the second derivative one?

With G(x) = J(x)^T w the gradient that a Function passes back, for a fixed w, the derivative of G is a Hessian: of
w . f(x).  So it has to be symmetric, and to agree with differences of G.  A straight-through estimator passes: its G
is piecewise constant, and is taken to be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.modules._functions import BackwardHookFunction

from fpq_analysis.curvature.steps import watch
from fpq_analysis.doctor.model_under_test import FAULT, NOTE, OK, Finding, ModelUnderTest, first, nodes, owner, short

# Relative disagreement beyond rounding, of u.Hv with v.Hu; in coarser types anything may be rounding.
ASYMMETRY = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE = 1e-2


class Differences(NamedTuple):
    """How a derivative is compared with differences of the gradient.

    Attributes:
        step, finer: relative to x; where the gradient jumps in between, quotients over the two do not agree.
        agrees: relative disagreement that is none.
        floor: the same relative to the gradient, which is as large where the derivative is zero.
    """

    step: float
    finer: float
    agrees: float
    floor: float


DIFFERENCES = {
    torch.float64: Differences(1e-6, 2.5e-7, 1e-3, 1e-6),
    torch.float32: Differences(1e-2, 2.5e-3, 5e-2, 1e-3),
}
# Directions, of which all that step over no jump must disagree; among steep jumps quotients agree by chance, once.
TURNS, ENOUGH = 3, 2
FEWER = 16  # a direction that does is tried again with so many times fewer entries moved

PLAIN_BACKWARD = (
    "Write its backward with differentiable operations on ctx.saved_tensors (no once_differentiable, no_grad, .data, "
    ".detach() or numpy); torch.utils.checkpoint has use_reentrant=False."
)
PLAIN_FORWARD = (
    "Let its backward be the derivative of one function, or write the forward in plain operations, x + (q(x) - x)"
    ".detach() for a straight-through estimator."
)
# The worst first; the rest are fine.
REPORTS = {
    "wrong": Finding(FAULT, "The second derivative of {} is silently wrong: {}.", PLAIN_BACKWARD),
    "raises": Finding(FAULT, "{} cannot be differentiated twice: {}.", PLAIN_BACKWARD),
    "asymmetric": Finding(NOTE, "What {} passes back is not the derivative of one function{}.", PLAIN_FORWARD),
    "unknown": Finding(NOTE, "{} could not be checked alone: {}."),
}


class Verdict(NamedTuple):
    """On one Function: a key of `REPORTS`, or `fine`."""

    status: str
    label: str
    detail: str


def report(verdicts: list[Verdict]) -> Finding:
    """The worst of them in a sentence."""
    for kind, (status, sentence, cure) in REPORTS.items():
        found = [v for v in verdicts if v.status == kind]
        if found:
            return Finding(status, sentence.format(first([v.label for v in found]), found[0].detail), cure)
    names = ", ".join(v.label for v in verdicts) or "none"
    return Finding(OK, f"Custom autograd.Functions, checked one by one: {names}.")


def check_functions(tested: ModelUnderTest) -> list[Verdict]:
    """A verdict on each custom Function in the graph of the loss."""
    loss, steps = watch(tested.model, tested.few_loss)
    made: dict[Any, Any] = {}
    for node in nodes(loss):
        function = getattr(node, "_forward_cls", None)  # of Python's Functions only
        if function not in (None, BackwardHookFunction):
            made.setdefault(function, node)
    verdicts = []
    for function, node in made.items():
        try:
            status, detail = _check(function, _arguments(function, tested.few_loss), tested.random)
        except Exception as error:  # the user's code: anything can happen
            status, detail = "unknown", short(error)
        verdicts.append(Verdict(status, f"'{function.__name__}' in {owner(steps, node)}", detail))
    return verdicts


def _arguments(function: Any, run: Callable[[], Tensor]) -> tuple[Any, ...]:
    """What the Function is first called with that wants a derivative: a network's input does not."""
    original = function.forward
    ctx = 1 if function.setup_context is torch.autograd.Function.setup_context else 0
    seen: list[tuple[Any, ...]] = []

    def record(*args: Any) -> Any:
        seen.append(args[ctx:])
        return original(*args)

    # `forward` is looked up on the class at each call, whoever kept a reference to `apply`.
    with mock.patch.object(function, "forward", staticmethod(record)):
        run()
    return next(args for args in seen if any(isinstance(a, Tensor) and a.requires_grad for a in args))


def _check(function: Any, arguments: tuple[Any, ...], random: Callable[[Tensor], Tensor]) -> tuple[str, str]:
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
    start = [arguments[i].detach() for i in places]
    weights: list[Tensor] = []  # w

    def gradient(values: list[Tensor]) -> Tensor:  # G
        given = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        for i, value in zip(places, values, strict=True):
            given[i] = value.view_as(value)  # the Function may work in place
        torch.manual_seed(0)
        outputs = function.apply(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if not weights:
            weights.extend(map(random, outputs))
        found = torch.autograd.grad(outputs, values, weights, create_graph=True, materialize_grads=True)
        return _flat(found) + 0 * _flat(values)  # a constant G has a derivative too

    def moved(v: Tensor) -> Tensor:
        parts = v.split([t.numel() for t in start])
        return gradient([(t + d.view_as(t)).requires_grad_() for t, d in zip(start, parts, strict=True)]).detach()

    leaves = [t.clone().requires_grad_() for t in start]
    u, *others = (
        _flat([random(t) * (float(t.norm()) / t.numel() ** 0.5 or 1.0) for t in start]) for _ in range(TURNS + 1)
    )
    try:
        g = gradient(leaves)
        hu, *products = (_flat(torch.autograd.grad(g, leaves, v, retain_graph=True)) for v in (u, *others))
    except RuntimeError as error:
        return "raises", short(error)

    size = float(g.detach().norm() * u.norm()) / len(u) ** 0.5
    least = DIFFERENCES[torch.float64].floor * size
    for v, hv in zip(others, products, strict=True):
        enough = max(ASYMMETRY.get(g.dtype, COARSE) * float(hu.norm() * v.norm()), least)
        if abs(float(hu @ v) - float(u @ hv)) > enough:
            return "asymmetric", ""
    # A Function may compute in a coarser type than it is given.
    ways = [how for kind, how in DIFFERENCES.items() if torch.finfo(kind).eps >= torch.finfo(g.dtype).eps]
    if not ways:
        return "unknown", f"in {g.dtype} differences of its gradient are all rounding"
    found = [_compared(moved, u, hu, v, random(v).argsort(), ways, size) for v in others]
    compared = [verdict for verdict in found if verdict is not None]
    if not compared:
        return "unknown", "its gradient jumps wherever it was tried"
    if "" in compared:
        return "fine", ""
    return ("wrong", compared[0]) if len(compared) >= ENOUGH else ("unknown", "its gradient jumps nearly everywhere")


def _compared(
    moved: Callable[[Tensor], Tensor],
    u: Tensor,
    hu: Tensor,
    v: Tensor,
    order: Tensor,
    ways: list[Differences],
    size: float,
) -> str | None:
    """How u.Hv disagrees with differences of the gradient; nothing if it does not, None if jumps hide it.

    Args:
        moved: the gradient at x + v.
        order: of the entries, of which ever fewer are moved.
        size: of u.g.
    """
    for how in ways:
        entries = len(v)
        while entries:
            few = torch.zeros_like(v).index_copy(0, order[:entries], v[order[:entries]])
            ours = float(hu @ few)
            true, finer = (float((moved(h * few) - moved(-h * few)) @ u) / (2 * h) for h in (how.step, how.finer))
            least = how.floor * size * (entries / len(v)) ** 0.5
            if abs(true - finer) <= max(how.agrees * max(abs(true), abs(finer)), least):
                enough = max(how.agrees * max(abs(true), abs(ours)), least)
                words = f"autograd gives {ours:.2g} where differences of the gradient give {true:.2g}"
                return words if abs(true - ours) > enough else ""
            entries //= FEWER
    return None


def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
