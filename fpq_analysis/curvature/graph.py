"""A proof, read off the autograd graph, that outputs are piecewise linear in each of some tensors alone.

Every node between a tensor and the outputs is one of:

- an operation that is piecewise linear in all its inputs together: whatever these depend on, it stays piecewise linear;
- a product (of matrices, a convolution, BatchNorm in eval mode): so long as no two of its factors depend on the same
  tensor, it is linear in each tensor, the others held;
- a custom `autograd.Function`, which no table knows: it is tried out, in float64 and by itself (`_bends`);
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
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils._python_dispatch import TorchDispatchMode

from fpq_analysis.curvature.steps import label

Node = Any  # torch's own type lacks most of what a node has


class NotExactError(Exception):
    """The model is outside the condition; the message names the operation, or the layer, and the reason."""


class Rule(NamedTuple):
    """When an operation is piecewise linear in what its inputs depend on; inputs by their position.

    Attributes:
        factors: groups of inputs that are multiplied with each other.
        held: inputs that may depend on no tensor in question: what is divided by, or where a grid is sampled.
        given: a condition on the attributes the node has saved.
    """

    factors: tuple[tuple[int, ...], ...] = ()
    held: tuple[int, ...] = ()
    given: Callable[[Node], bool] | None = None


def _in_eval_mode(node: Node) -> bool:
    return node._saved_training is False


def _to_the_first(node: Node) -> bool:
    exponent = node._saved_exponent
    return isinstance(exponent, (int, float)) and exponent in (0, 1)


def _not_a_product(node: Node) -> bool:
    return node._saved_reduce != "prod"


# By the names of autograd's nodes, without `Backward0`.
_OPERATIONS: list[tuple[Rule, str]] = [
    # Each output is an input, or a sum of inputs with constant weights.
    (
        Rule(),
        """Add Sub Rsub Neg Sum Nansum Mean Cumsum Trace Clone LazyClone Copy ToCopy Alias Lift LiftFresh Detach Fill
        Zero View UnsafeView ReshapeAlias ReshapeCopy AsStrided AsStridedScatter Expand Repeat Permute Transpose T
        Squeeze Unsqueeze Slice SliceScatter SliceInverse Select SelectScatter NarrowCopy Split UnsafeSplit
        SplitWithSizes UnsafeSplitWithSizes Chunk Unbind Cat Stack BlockDiag Diagonal DiagEmbed DiagonalScatter Tril
        Triu Flip Roll Rot90 Unfold Im2Col Col2Im PixelShuffle PixelUnshuffle ChannelShuffle Index UnsafeIndex IndexAdd
        IndexCopy IndexFill IndexPut IndexPutImpl UnsafeIndexPut UnsafeMaskedIndex UnsafeMaskedIndexPutAccumulate
        IndexSelect Gather Scatter ScatterAdd Take Put MaskedFill MaskedScatter MaskedSelect Embedding ConstantPadNd
        ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D
        UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D
        UpsampleNearestExact3D UpsampleLinear1D UpsampleBilinear2D UpsampleBilinear2DAa UpsampleTrilinear3D
        UpsampleBicubic2D UpsampleBicubic2DAa UpsampleLanczos2DAa AvgPool2D AvgPool3D AdaptiveAvgPool2D
        AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D MkldnnReshape ToMkldnn ToDense PinMemory AffineGridGenerator
        CudnnAffineGridGenerator NativeDropout FusedDropout Deg2Rad Rad2Deg""",
    ),
    # Which input, or which constant, depends on the place: linear on each piece.
    (
        Rule(),
        """Relu LeakyRelu RreluWithNoise RreluWithNoiseFunctional Threshold Hardtanh Hardsigmoid Hardshrink Softshrink
        Clamp ClampMin ClampMax Abs Copysign NanToNum Frac Fmod Remainder Where Max Min Amax Amin Aminmax Maximum
        Minimum Fmax Fmin Cummax Cummin Sort Topk Kthvalue Median Nanmedian Mode MaxPool2D MaxPool2DWithIndices
        MaxPool3DWithIndices MkldnnMaxPool2D MkldnnMaxPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D FractionalMaxPool2D
        FractionalMaxPool3D MaxUnpool2D MaxUnpool3D""",
    ),
    # Constant on each piece.
    (Rule(), "Round Floor Ceil Trunc Sign Sgn"),
    # Fake quantization with a straight-through derivative; linear in the values, not in the scale.
    (
        Rule(held=(1, 2)),
        """FakeQuantizePerTensorAffineCachemask FakeQuantizePerTensorAffineCachemaskTensorQparams
        FakeQuantizePerChannelAffineCachemask FakeQuantizeLearnablePerTensorAffine
        FakeQuantizeLearnablePerChannelAffine FusedMovingAvgObsFqHelper""",
    ),
    # Products; prelu multiplies its slope with the negative part of its input.
    (Rule(factors=((0, 1),)), "Mul Mm Bmm Mv Dot Vdot LinalgCross PreluKernel EmbeddingBag"),
    (Rule(factors=((0, 1, 2),)), "Trilinear"),
    (Rule(factors=((1, 2),)), "Addmm Addmv Addr Addbmm Baddbmm Addcmul"),
    (Rule(factors=((0, 2), (1, 2))), "Lerp"),
    # Input times weight, plus bias.
    (
        Rule(factors=((0, 1),)),
        """Linear MkldnnLinear Convolution ConvolutionOverrideable CudnnConvolution CudnnConvolutionTranspose
        MkldnnConvolution MiopenConvolution MiopenConvolutionTranspose MiopenDepthwiseConvolution MpsConvolution
        MpsConvolutionTranspose NnpackSpatialConvolution SlowConv2D SlowConv3D SlowConvDilated2D SlowConvDilated3D
        SlowConvTranspose2D SlowConvTranspose3D ConvDepthwise2D ConvDepthwise3D ConvTbc""",
    ),
    # The same, where mean and variance are constants.
    (
        Rule(factors=((0, 1),), given=_in_eval_mode),
        "NativeBatchNorm NativeBatchNormLegit CudnnBatchNorm MiopenBatchNorm",
    ),
    (Rule(factors=((0, 1),)), "NativeBatchNormLegitNoTraining BatchNormNoUpdate"),
    # Linear in the first, or the first two, and not in the last.
    (Rule(held=(1,)), "Div GridSampler2D GridSampler2DCpuFallback GridSampler3D CudnnGridSampler"),
    (Rule(held=(2,)), "Addcdiv"),
    (Rule(given=_to_the_first), "Pow"),
    (Rule(given=_not_a_product), "ScatterReduce IndexReduce"),
]
RULES = {name: rule for rule, names in _OPERATIONS for name in names.split()}

# Whole parts of a model that cannot be looked into.
OPAQUE = {
    "CompiledFunction": "a compiled part (torch.compile)",
    "DifferentiableGraph": "a TorchScript part",
    "CheckpointFunction": "a checkpointed part (other than with use_reentrant=False)",
}


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


def structure(output: Tensor) -> tuple[Any, ...]:
    """Equal for two graphs of the same operations, connected in the same way."""
    places: dict[Node, int] = {}
    lines = []
    for place, node in enumerate(nodes(output)):
        places[node] = place
        rule = RULES.get(_operation(node))
        inputs = tuple(places.get(before, -1) for before, _ in node.next_functions)
        lines.append((node.name(), rule is None or rule.given is None or rule.given(node), inputs))
    return tuple(lines)


def prove(model: nn.Module, run: Callable[[], Tensor], variables: Callable[[], dict[str, Tensor]]) -> Tensor:
    """What `run` gives, if it is piecewise linear in each of the variables alone.

    Args:
        model: whose modules name the place of an operation.
        run: a forward pass of it; done a second time where the graph alone does not say all.
        variables: leaf tensors that want gradients, by what they are called in the reason; asked for after each pass.

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
        if any(inputs):
            hidden = of_slices.get(node._sequence_nr()) if _operation(node) == "CopySlices" else None
            found = _fault(node, inputs, calls.get(node), hidden)
            if found:
                what, why, which = found
                name = list(named)[(which & -which).bit_length() - 1]
                raise NotExactError(f"{what} in {place(node)} {why} {name}")
    return output


def prove_parameters(model: nn.Module, x: Tensor, parameters: dict[str, Tensor]) -> None:
    """`prove` that the outputs for inputs `x` are piecewise linear in each parameter, and that each is used once.

    Raises:
        NotExactError: as `prove`, or with the parameter that is used again.
    """
    with torch.enable_grad(), wanting(model, parameters.values()):
        output = prove(model, lambda: model(x), lambda: {f"'{name}'": p for name, p in parameters.items()})
        used = Counter(id(getattr(b, "variable", None)) for node in nodes(output) for b, _ in node.next_functions)
    for name, p in parameters.items():
        if used[id(p)] > 1:
            raise NotExactError(f"'{name}' is used more than once in a forward pass")


@contextmanager
def wanting(model: nn.Module, parameters: Iterable[Tensor] = ()) -> Iterator[None]:
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


# What is not piecewise linear, why (a predicate that ends with the variable's name), and in which variables.
Fault = tuple[str, str, int]
UNKNOWN = "is not known to be piecewise linear, and depends on"


def _fault(node: Node, inputs: list[int], call: tuple[Any, ...] | None, of_slice: str | None) -> Fault | None:
    every = reduce(or_, inputs)
    if any(kept.dtype.is_complex for kept in node._input_metadata):
        return "a complex number", UNKNOWN, every
    function = getattr(node, "_forward_cls", None)
    if function is BackwardHookFunction:  # the identity
        return None
    operation = of_slice or _operation(node)
    if operation in OPAQUE:
        return OPAQUE[operation], "does not show its operations, and depends on", every
    if function is not None:
        return _fault_of_function(function, call, inputs)
    rule = RULES.get(operation)
    label = f"'{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', operation).lower()}'"
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


def _operation(node: Node) -> str:
    """`Relu` of `ReluBackward0`, `Copy` of `CopyBackwards`."""
    found = re.fullmatch(r"(?:.*::)?(\w+?)(?:Backwards?\d*)?", node.name())
    return found[1] if found else str(node.name())


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
        if not functions and not any(_operation(node) == "CopySlices" for node in graph):
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


# --- Custom Functions ---

# Where they are tried: at their own arguments moved so far, and at random ones, of every size and evenly up to TEN.
MOVES = (0.0, 1e-3, 1.0)
TEN = 10.0
FEWEST = 2**10  # random numbers to try an argument at, in so many calls at most
CALLS = 16
# Where a slope becomes another is narrowed down in arguments of no more numbers than that (the calls add up).
HALVINGS = 40
MOST = 2**16
FLAT = 1e-10  # relative to the slope


def _fault_of_function(function: Any, call: tuple[Any, ...] | None, inputs: list[int]) -> Fault | None:
    """As `_fault`: along the inputs that share a variable together, with the others held."""
    every = reduce(or_, inputs)
    label = f"the Function '{function.__name__}'"
    if call is None:
        return label, "was not seen when it was called, and depends on", every
    tensors = [i for i, a in enumerate(call) if isinstance(a, Tensor)]
    if len(tensors) != len(inputs):
        return label, "has inputs other than its arguments, and depends on", every
    bits = [1 << i for i in range(every.bit_length()) if every >> i & 1]
    groups: dict[tuple[int, ...], int] = {}
    for bit in bits:
        together = tuple(i for i, depends in zip(tensors, inputs, strict=True) if depends & bit)
        groups[together] = groups.get(together, 0) | bit
    for together, which in groups.items():
        try:
            bent = _bends(function, call, together)
        except Exception as error:  # the user's code: anything can happen
            first = str(error).strip().partition("\n")[0]
            why = f"cannot be tried out in float64 ({type(error).__name__}: {first}), and depends on"
            return label, why, which
        if bent:
            return label, "is curved in what depends on", which
    return None


def _bends(function: Any, call: tuple[Any, ...], places: tuple[int, ...]) -> bool:
    """Whether the second derivative in the arguments at these places, taken together, is found not to vanish.

    In float64; points and directions are of absolute size, so that zeros move and tiny arguments move far.
    """
    generator = torch.Generator().manual_seed(0)

    def wide(t: Tensor) -> Tensor:
        where = "cpu" if t.device.type == "mps" else t.device
        return t.detach().to(where, torch.float64 if t.is_floating_point() else t.dtype, copy=True)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    def even(like: Tensor) -> Tensor:
        return TEN * (2 * torch.rand(like.shape, generator=generator, dtype=like.dtype) - 1).to(like.device)

    weights: list[Tensor] = []

    def look(point: list[Tensor]) -> tuple[list[Tensor], bool]:
        """The slopes at a point, and whether they change."""
        args = [wide(a) if isinstance(a, Tensor) else a for a in call]
        leaves = [t.clone().requires_grad_() for t in point]
        for i, leaf in zip(places, leaves, strict=True):
            args[i] = leaf.view_as(leaf)  # it may work in place
        found = function.apply(*args)
        outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Tensor)]
        outputs = [t for t in outputs if t.requires_grad]
        if not weights:
            weights.extend(map(random, outputs))
        slopes = torch.autograd.grad(outputs, leaves, weights, create_graph=True, materialize_grads=True)
        largest = max(float(t.detach().abs().max()) for t in slopes)
        bends = [torch.zeros(())]
        curved = [t for t in slopes if t.requires_grad]
        if curved:
            along = [random(t) for t in curved]
            bends = list(torch.autograd.grad(curved, leaves, along, materialize_grads=True))
        bent = not max(float(t.abs().max()) for t in bends) <= FLAT * largest
        return [t.detach() for t in slopes], bent

    here = [wide(call[i]) for i in places]
    numbers = min(max(t.numel(), 1) for t in here)
    points = [[t + size * random(t) for t in here] for size in MOVES]
    for _ in range(min(CALLS, -(-FEWEST // numbers))):
        points += [[even(t) for t in here], [random(t).sign() * 10 ** (even(t) / 2) for t in here]]
    if any(look(point)[1] for point in points):
        return True
    if max(t.numel() for t in here) > MOST:
        return False
    # A bend however narrow lies between two slopes; each number is narrowed down by itself.
    for _ in range(2):
        low, high = ([even(t) for t in here] for _ in range(2))
        slopes_low, slopes_high = look(low)[0], look(high)[0]
        for _ in range(HALVINGS):
            middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
            slopes, bent = look(middle)
            if bent:
                return True
            below = [(s - a).abs() > (b - s).abs() for a, s, b in zip(slopes_low, slopes, slopes_high, strict=True)]
            low, slopes_low = _chosen(below, low, middle), _chosen(below, slopes_low, slopes)
            high, slopes_high = _chosen(below, middle, high), _chosen(below, slopes, slopes_high)
    return False


def _chosen(where: list[Tensor], these: list[Tensor], those: list[Tensor]) -> list[Tensor]:
    return [torch.where(*each) for each in zip(where, these, those, strict=True)]
