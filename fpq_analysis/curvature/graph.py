"""A proof, read off the autograd graph, that outputs are piecewise linear in each of some tensors alone.

Every node between a tensor and the outputs is one of:

- an operation that is piecewise linear in all its inputs together: whatever these depend on, it stays piecewise linear;
- a product (of matrices, a convolution, BatchNorm in eval mode): so long as no two of its factors depend on the same
  tensor, it is linear in each tensor, the others held;
- a custom `autograd.Function`, which no table knows: it is tried out, in float64 and by itself (`functions.py`);
- anything else, a smooth activation or an operation nobody has looked at: no proof, and its name is the reason.

"Piecewise linear" means: the second derivative that autograd gives is zero almost everywhere.  What is detached is
held, as in all of autograd, and a Function whose backward is not the derivative of its forward is taken at its word
(straight-through estimators are such Functions, on purpose).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from operator import or_
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils._python_dispatch import TorchDispatchMode

from fpq_analysis.curvature.functions import fault_of_function
from fpq_analysis.curvature.operations import OPAQUE, RULES, UNKNOWN, Fault, Node, NotExactError, operation
from fpq_analysis.curvature.steps import label
from fpq_analysis.nests import Nest


def nodes(output: Tensor) -> list[Node]:
    """Every node of the graph behind `output`, each after those its inputs come from."""
    found: dict[Node, None] = {}
    entered: set[Node] = set()
    todo = [output.grad_fn]
    while todo:
        node = todo[-1]
        if node is None or node in found or node in entered:
            todo.pop()
            if node is not None:
                found[node] = None
            continue
        entered.add(node)
        todo += [before for before, _ in node.next_functions if before not in entered]
    return list(found)


def graph_signature(output: Tensor) -> tuple[Any, ...]:
    """Equal for two graphs of the same operations, connected in the same way."""
    places: dict[Node, int] = {}
    lines = []
    for place, node in enumerate(nodes(output)):
        places[node] = place
        rule = RULES.get(operation(node))
        inputs = tuple(places.get(before, -1) for before, _ in node.next_functions)
        lines.append((node.name(), rule is None or rule.given is None or rule.given(node), inputs))
    return tuple(lines)


def prove(
    model: nn.Module,
    run: Callable[[], Tensor],
    variables: Callable[[], dict[str, Tensor]],
    outside: set[str] | None = None,
) -> Tensor:
    """What `run` gives, if it is piecewise linear in each of the variables alone.

    Args:
        model: whose modules name the place of an operation.
        run: a forward pass of it; done a second time where the graph alone does not say all.
        variables: leaf tensors that want gradients, by what they are called in the reason; asked for after each pass.
        outside: takes up the names of all variables for which it is not; None: the first one is an error.

    Raises:
        NotExactError: with the operation, the module it stands in and the variable.
    """
    output, calls, of_slices, place = _observe(model, run)
    named = variables()
    bits = {id(leaf): 1 << i for i, leaf in enumerate(named.values())}
    depends: dict[Node, int] = {}  # on which variables, a bit each
    for node in nodes(output):
        inputs = [depends.get(before, 0) for before, _ in node.next_functions]
        depends[node] = reduce(or_, inputs, bits.get(id(getattr(node, "variable", None)), 0))
        while any(inputs):
            hidden = of_slices.get(node._sequence_nr()) if operation(node) == "CopySlices" else None
            found = _fault(node, inputs, calls.get(node), hidden)
            if not found:
                break
            what, why, which = found
            names = [name for i, name in enumerate(named) if which >> i & 1]
            if outside is None:
                raise NotExactError(f"{what} in {place(node)} {why} {names[0]}")
            outside.update(names)
            inputs = [bits_of & ~which for bits_of in inputs]
            depends[node] &= ~which
    return output


def prove_parameters(model: nn.Module, x: Nest, parameters: dict[str, Tensor]) -> None:
    """`prove` that the outputs for inputs `x` are piecewise linear in each parameter, and that each is used once.

    Raises:
        NotExactError: as `prove`, or with the parameter that is used again.
    """
    with torch.enable_grad(), requiring_grad(model, parameters.values()):
        output = prove(model, lambda: model(x), lambda: {f"'{name}'": p for name, p in parameters.items()})
        used = Counter(id(getattr(b, "variable", None)) for node in nodes(output) for b, _ in node.next_functions)
    for name, p in parameters.items():
        if used[id(p)] > 1:
            raise NotExactError(f"'{name}' is used more than once in a forward pass")


@contextmanager
def requiring_grad(model: nn.Module, parameters: Iterable[Tensor] = ()) -> Iterator[None]:
    """Inside, these parameters of the model want gradients, and no others."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    chosen = {id(p) for p in parameters}
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def _fault(node: Node, inputs: list[int], call: tuple[Any, ...] | None, of_slice: str | None) -> Fault | None:
    every = reduce(or_, inputs)
    if any(kept.dtype.is_complex for kept in node._input_metadata):
        return "a complex number", UNKNOWN, every
    function = getattr(node, "_forward_cls", None)
    if function is BackwardHookFunction:  # the identity
        return None
    kind = of_slice or operation(node)
    if kind in OPAQUE:
        return OPAQUE[kind], "does not show its operations, and depends on", every
    if function is not None:
        return fault_of_function(function, call, inputs)
    rule = RULES.get(kind)
    label = f"'{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', kind).lower()}'"
    if rule is None or (rule.given and (of_slice is not None or not rule.given(node))):
        return label, UNKNOWN, every
    at = dict(enumerate(inputs))  # a number in a tensor's place is no input
    for position in rule.held:
        if at.get(position):
            return label, f"is not linear in its operand {position + 1}, which depends on", at[position]
    for group in rule.factors:
        seen = 0
        for here in (at.get(position, 0) for position in group):
            if seen & here:
                return label, "multiplies two factors that both depend on", seen & here
            seen |= here
    return None


# --- What the graph alone does not say ---


def _observe(
    model: nn.Module, run: Callable[[], Tensor]
) -> tuple[Tensor, dict[Node, tuple[Any, ...]], dict[int, str], Callable[[Node], str]]:
    """The output, arguments of custom Functions' calls, names of operations in place on views, and nodes' modules."""
    spans: list[tuple[int, int, str]] = []
    starts: list[int] = []

    def finish(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            spans.append((starts.pop(), _clock(), label(name, module)))

        return hook

    def place(node: Node) -> str:
        around = [(end - start, label) for start, end, label in spans if start <= node._sequence_nr() < end]
        return min(around)[1] if around else "the model"

    with ExitStack() as stack:
        for name, module in model.named_modules():
            # The first to see the call, and the last.
            start = module.register_forward_pre_hook(lambda module, args: starts.append(_clock()), prepend=True)
            stack.callback(start.remove)
            stack.callback(module.register_forward_hook(finish(name)).remove)
        output = run()
        graph = nodes(output)
        functions = {getattr(node, "_forward_cls", None) for node in graph} - {None, BackwardHookFunction}
        if not functions and not any(operation(node) == "CopySlices" for node in graph):
            return output, {}, {}, place
        spans.clear()
        calls: dict[Node, tuple[Any, ...]] = {}
        for function in functions:
            stack.enter_context(_recorded(function, calls))
        in_place = stack.enter_context(_InPlace())
        return run(), calls, in_place.names, place


def _clock() -> int:
    """The number autograd gives to the next node."""
    return int(torch._C._autograd._get_sequence_nr())


@contextmanager
def _recorded(function: Any, calls: dict[Node, tuple[Any, ...]]) -> Iterator[None]:
    """Inside, the arguments of every call of a custom Function are kept by its node, which is the `ctx` it gets."""
    whole = function.setup_context is Function.setup_context
    kind = "forward" if whole else "setup_context"
    original = getattr(function, kind)

    def record(ctx: Node, *args: Any, **options: Any) -> Any:
        given = args if whole else options.get("inputs", args[0] if args else ())
        calls[ctx] = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in given)
        return original(ctx, *args, **options)

    # Looked up on the class at each call, whoever kept a reference to `apply`.
    with mock.patch.object(function, kind, staticmethod(record)):
        yield


class _InPlace(TorchDispatchMode):
    """Names of the operations in place, by the number of the node that autograd makes next.

    On a view this is a `CopySlices`, in which the operation's own node is hidden.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and torch.is_grad_enabled():  # not inside of a custom Function
            name = func._schema.name.partition("::")[2].strip("_")
            self.names[_clock()] = "".join(part.capitalize() for part in name.split("_"))
        return func(*args, **(kwargs or {}))
