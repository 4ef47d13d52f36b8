"""Which of autograd's operations are piecewise linear in their inputs, and in which of them together.

"Piecewise linear" means: the second derivative that autograd gives is zero almost everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

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

# What is not piecewise linear, why (a predicate that ends with the variable's name), and in which variables.
Fault = tuple[str, str, int]
UNKNOWN = "is not known to be piecewise linear, and depends on"


def operation(node: Node) -> str:
    """`Relu` of `ReluBackward0`, `Copy` of `CopyBackwards`."""
    found = re.fullmatch(r"(?:.*::)?(\w+?)(?:Backwards?\d*)?", node.name())
    return found[1] if found else str(node.name())
