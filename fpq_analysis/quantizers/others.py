"""Quantizers that are not of this package: recognised by their classes' names, and by what they do to a weight.

Those that have no adapter (`adapters/`), that is: the others have become ours before.  Their rounding cannot be taken
out, so only the Hessian in the trained weights, `latent`, is available.  A
weight that is rounded shows in this: moving it a little leaves the output of its layer as it was, though the gradient,
which is straight-through, says otherwise.  No list of classes is needed for that, and nothing is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from fpq_analysis.errors import UserError
from fpq_analysis.quantizers.base import Quantizer

# A class's module begins with the first, and its name holds the second.
CLASSES = {
    "torch.ao": ("torch.ao.quantization.", "FakeQuantizeBase"),
    "torchao": ("torchao.", "FakeQuantiz"),
    "Brevitas": ("brevitas.proxy.", "QuantProxy"),
    "ModelOpt": ("modelopt.torch.quantization.", "TensorQuantizer"),
}
CONVERTED = "torch.ao.nn.quantized."  # where torch.ao has modules that integers pass through, and others
REFERENCE = f"{CONVERTED}reference."
WEIGHT = "weight"  # in the name of what quantizes one
SWITCHES = ("fake_quant_enabled", "enabled", "is_enabled", "is_quant_enabled")  # by which they are taken off
DISABLE = "model.apply(torch.ao.quantization.disable_observer)"
REGISTER = "fpq_analysis.register_adapter (docs/quantizers/own.md)"
LATENT = (
    "Measure definition='latent' (--definition latent), the Hessian in the trained weights (of landscapes, "
    f"weights='requantized', --weights requantized); or tell how it rounds: {REGISTER}."
)
DISAGREES = (
    "does not move the output as its gradient says (it is rounded behind a straight-through estimator, or a backward "
    "is no derivative)"
)
# What goes back into the outputs is scaled by this, no power of two; by how much of its largest entry a gradient may
# then be off: 16 bits round by 0.4 %, eight by 6.
SCALED, LINEAR = 1000 / 3, 0.01
# Entries of a weight that are moved, and weights of a whole network; the steps relative to the weight's size, in
# float64 and where that does not run; and how far off is no rounding of arithmetic.
ENTRIES, SOME = (2, 8), 4
STEPS = (1e-6, 1e-4)
AGREES = 0.05


def other_quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, package) for every quantizer of another package that is switched on."""
    for name, module in model.named_modules():
        for package, (where, what) in CLASSES.items():
            known = any(kind.__module__.startswith(where) and what in kind.__name__ for kind in type(module).__mro__)
            if known and all(bool(getattr(module, switch, True)) for switch in SWITCHES):
                yield name, module, package


def learned_by_others(model: nn.Module) -> list[nn.Parameter]:
    """Scales and zero points that quantizers of other packages learn; not the weights, which some of them hold, too."""
    theirs = [module for _, module, _ in other_quantizers(model) if not _is_layer(module)]
    inside = {part for module in theirs for part in module.modules()}
    weights = {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    return [p for module in theirs for p in module.parameters() if id(p) not in weights]


def _is_layer(module: nn.Module) -> bool:
    return any(
        kind.__module__.startswith("torch.nn.modules.") for kind in type(module).__mro__ if kind is not nn.Module
    )


def live_observer(model: nn.Module) -> str:
    """The first fake quantizer that sets its scale by what passes through it, even in eval mode; or nothing."""
    found = (name for name, module, _ in other_quantizers(model) if bool(getattr(module, "observer_enabled", False)))
    return next(found, "")


def check_not_converted(model: nn.Module) -> None:
    """Raise `UserError` if the network, or a part of it, computes with integers."""
    stored = stored_as_integers(model)
    passed = "" if stored else passed_as_integers(model)
    if stored or passed:
        what = f"'{stored}' is stored as integers" if stored else f"'{passed}' makes integers of what passes"
        raise UserError(
            f"{what}: the network was converted for inference. {'These weights have' if stored else 'Behind it is'} no "
            "gradient, and the Hessian would be that of the rest alone. Measure the network as it was before it was "
            "converted, with its fake quantizers."
        )


def check_definition_applies(model: nn.Module, definition: str) -> None:
    """Raise `UserError` where another package's quantizer, recognised by its class, stands against the definition."""
    observer = live_observer(model)
    if observer:
        raise UserError(
            f"The fake quantizer '{observer}' still observes: each forward pass moves its scale, so that the outputs "
            f"depend on what else was passed. Switch that off first: {DISABLE}."
        )
    for name, _, package in other_quantizers(model):
        if definition == "float" or (definition == "dequantized" and WEIGHT in name):
            raise UserError(_refusal(f"'{name}' is a quantizer of {package}", definition))


def stored_as_integers(model: nn.Module) -> str:
    """The first weight that a conversion for inference left as integers, by its name; or nothing.

    Tensors that torch calls quantized, those of 8 bits that are no masks, and the packages' own kinds of tensor.
    """
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        for t in tree_leaves(value):
            if not isinstance(t, Tensor) or t.ndim < 2:
                continue
            packed = t.is_quantized or type(t).__module__.startswith(("torchao.", "modelopt."))
            if packed or (t.dtype in (torch.int8, torch.uint8) and bool((t.abs() > 1).any())):
                return name.partition("._packed_params")[0]
    return ""


def passed_as_integers(model: nn.Module) -> str:
    """The first module or node of a graph that quantizes to integers, as reference networks do; or nothing."""
    for name, module in model.named_modules():
        kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith(CONVERTED)]
        if any(kind.__module__.startswith(REFERENCE) or kind.__name__ == "Quantize" for kind in kinds):
            return name
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            target = getattr(node.target, "__name__", str(node.target))
            if node.op in ("call_function", "call_method") and target.startswith("quantize_"):
                return str(node.name)
    return ""


def rounds_weights(model: nn.Module, x: Tensor) -> bool:
    """Whether something that is not of this package rounds weights, by its class or by what it does."""
    return any(WEIGHT in name for name, _, _ in other_quantizers(model)) or bool(rounded_weight(model, x))


def check_plain(view: nn.Module, x: Tensor, definition: str) -> None:
    """Raise `UserError` if a view of plain weights, of `dequantized` or `float`, rounds one after all.

    Args:
        x: one input or more to run it on.
    """
    name = rounded_weight(view, x)
    if name:
        raise UserError(_refusal(f"'{name}' {DISAGREES}", definition))
    if definition == "float":
        named = [name for name, p in view.named_parameters() if p.requires_grad]
        some = named[:: max(1, len(named) // SOME)]
        if _rounds(view, (x,), {}, some):
            finding = "The activations are rounded in the forward pass, but not in the gradient"
            raise UserError(_refusal(finding, definition))


def check_gradient_is_linear(view: nn.Module, x: Tensor) -> None:
    """Raise `UserError` if the backward pass rounds to 8 bits, as those of fake quantizers to float8 do.

    The second derivatives would be made of that rounding, and be zero where it underflows.

    Args:
        x: one input or more to run it on.
    """
    named = {name: p for name, p in view.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        outputs = view(x)
        back = torch.linspace(0.5, 1, outputs.numel()).to(outputs).view_as(outputs)
        once, scaled = (
            torch.autograd.grad(outputs, list(named.values()), factor * back, retain_graph=True, allow_unused=True)
            for factor in (1, SCALED)
        )
    for name, a, b in zip(named, once, scaled, strict=True):
        if a is not None and not bool((b - SCALED * a).abs().max() <= LINEAR * b.abs().max()):
            raise UserError(
                f"The gradient in '{name}' is rounded in the backward pass: {SCALED:.0f} times as much into it is not "
                f"{SCALED:.0f} times as much out of it, as where a layer works in float8. Second derivatives would be "
                f"made of that rounding. Switch the quantizer off, or tell how it rounds: {REGISTER}."
            )


def _refusal(finding: str, definition: str) -> str:
    return f"{finding}, so the definition '{definition}' cannot be told apart from the others. {LATENT}"


def rounded_weight(model: nn.Module, x: Tensor) -> str:
    """The first trainable weight whose layer rounds it, by its name; or nothing.

    Each module that owns weights is run on its own, on the inputs that it gets in a forward pass for `x`, and without
    the hooks on it: quantizers of inputs and outputs are none of weights.  Weights that their owner does not use, as
    those borrowed by the module around it, are tried in that one.
    """
    calls: dict[str, tuple[Any, ...]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(name, tree_map(_clone, (args, kwargs)))

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as hooks, torch.no_grad():
        for name, m in modules.items():
            hooks.enter_context(m.register_forward_pre_hook(record(name), with_kwargs=True))
        model(x)
    by_owner: dict[str, list[str]] = {}
    ours = tuple(f"{name}." for name, m in modules.items() if isinstance(m, Quantizer))
    for name, p in model.named_parameters():
        owner = name.rpartition(".")[0]
        while owner and (owner not in calls or ".parametrizations." in f".{owner}."):
            owner = owner.rpartition(".")[0]
        if p.requires_grad and owner in calls and not name.startswith(ours):
            by_owner.setdefault(owner, []).append(name)
    for owner, names in by_owner.items():
        if _uses_plainly(modules[owner]):
            continue
        inside = {name: name.removeprefix(f"{owner}.") if owner else name for name in names}
        args, kwargs = calls[owner]
        found = _rounds(modules[owner], args, kwargs, list(inside.values()))
        if found:
            name = next(name for name, inner in inside.items() if inner == found)
            return name.replace("parametrizations.weight.original", "weight")
    return ""


def _uses_plainly(module: nn.Module) -> bool:
    """Whether it is a layer of PyTorch's own, with no other forward put in its place: most are, and need no trial."""
    own = type(module).__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
    return own and type(module).forward.__module__.startswith("torch.nn.") and not any(module.children())


def _rounds(module: nn.Module, args: Any, kwargs: Any, parameters: Collection[str]) -> str:
    """The first parameter whose gradient is not what moving it does; nothing if none is, or it cannot be tried."""
    for change, step in zip((_double, lambda t: t), STEPS, strict=True):
        try:
            copied = change(copy.deepcopy(module))
            if isinstance(copied, GraphModule):  # it has no layers to be tried, and its activations are rounded
                _leave_out_quantizers(copied)
            given, named = tree_map(change, (args, kwargs))
            return _compare(copied, given, named, parameters, step)
        except Exception:  # the user's code: anything can happen; what is known by its class is refused before
            continue
    return ""


def _leave_out_quantizers(graph: GraphModule) -> None:
    for name, module in list(graph._modules.items()):  # one may be there under several names
        if isinstance(module, Quantizer):
            graph.set_submodule(name, nn.Identity())


def _compare(module: nn.Module, args: Any, kwargs: Any, parameters: Collection[str], step: float) -> str:
    own = {name: p for name, p in module.named_parameters() if name in parameters}
    weights: list[Tensor] = []

    def value() -> Tensor:
        given, named = tree_map(_clone, (args, kwargs))  # the forward pass may work in place
        outputs = [t for t in tree_leaves(module.forward(*given, **named)) if isinstance(t, Tensor)]
        outputs = [t for t in outputs if t.is_floating_point()]
        if not weights:
            weights.extend(torch.randn_like(t) for t in outputs)
        return torch.stack([(t * w).sum(dtype=_widest(t)) for t, w in zip(outputs, weights, strict=True)]).sum()

    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        with torch.no_grad():
            for p in own.values():  # off the kinks, where a derivative is one-sided
                p.add_(torch.randn_like(p), alpha=1e-3 * _size(p))
        start = value()
        if not start.requires_grad:
            return ""
        gradients = torch.autograd.grad(start, list(own.values()), allow_unused=True)
        for (name, p), g in zip(own.items(), gradients, strict=True):
            if g is not None and _disagrees(p, g, value, float(start.detach().abs()), step):
                return name
    return ""


@torch.no_grad()
def _disagrees(p: Tensor, g: Tensor, value: Any, scale: float, step: float) -> bool:
    """Whether moving single entries does to the value what their gradient says, by central differences."""
    step *= _size(p)
    slopes = g.reshape(-1)
    fine = p.dtype == torch.float64
    for place in slopes.abs().topk(min(ENTRIES[not fine], len(slopes))).indices:
        promised = 2 * step * float(slopes[place])
        if abs(promised) <= (1e4 if fine else 100) * torch.finfo(p.dtype).eps * scale:  # the value's own rounding
            continue
        where = torch.unravel_index(place, p.shape)
        before = p[where].clone()
        ends = []
        for sign in (1, -1):
            p[where] = before + sign * step
            ends.append(float(value()))
        p[where] = before
        done = ends[0] - ends[1]
        # Coarse numbers show no more than that nothing moved; a larger step may have gone over the edge of a level.
        if abs(done - promised) > AGREES * abs(promised) if fine else done == 0:
            return True
    return False


def _size(p: Tensor) -> float:
    return float(p.detach().square().mean().sqrt()) or 1.0


def _double(t: Any) -> Any:
    return t.double() if isinstance(t, nn.Module) or (isinstance(t, Tensor) and t.is_floating_point()) else t


def _clone(t: Any) -> Any:
    return t.clone() if isinstance(t, Tensor) else t


def _widest(t: Tensor) -> torch.dtype:
    return t.dtype if t.device.type == "mps" else torch.float64
