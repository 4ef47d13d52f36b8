"""Quantized networks in the forms other programs read: ONNX with QuantizeLinear pairs, and integers in safetensors.

Both hold whole numbers k, a scale s and a zero point z for each quantized tensor, value = (k - z) s; weights have a
scale and a zero point for each output channel (axis 0), inputs one of each.  Where zero is not on the grid (a learned
offset; DoReFa's weights), an offset is added.  BatchNorm stays a layer of its own.

What onnxruntime 1.32 really runs on a CPU was tried: QuantizeLinear and DequantizeLinear on uint4, uint8 and uint16
(opset 21), but no Clip before a QuantizeLinear to uint4, on which its optimiser fails.  So weights of 2 to 4 bits are
stored as uint4, two to a byte, of 5 to 8 bits as uint8, of 9 to 16 as uint16.  Inputs of 4, 8 and 16 bits use the type
of their width; others the next of uint8 and uint16, behind a Clip that keeps them within the grid.  uint2 (opset 25)
runs there too, but in few other programs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fpq_analysis.errors import UserError, did_you_mean, naming
from fpq_analysis.files import atomic_write
from fpq_analysis.quantizers import quantizers, view
from fpq_analysis.quantizers.apply import latent_weight
from fpq_analysis.runs.checkpoint import Checkpoint, read_checkpoint
from fpq_analysis.runs.run import Run

OPSET = 21
# The smallest type of ONNX that holds so many bits.
TYPES = {4: "UINT4", 8: "UINT8", 16: "UINT16"}
CLIPPED_TYPES = {8: "UINT8", 16: "UINT16"}
# Ops between a weight and the layer that uses it.
PASSED = ("Transpose", "Reshape", "Identity", "Unsqueeze", "Squeeze", "Cast")
# Images (of random pixels) on which the file is compared with the network before it is kept.
N_CHECK = 64
# An input a rounding error away from the middle of two levels may fall on either side in another program, and moves
# the output by about one step of one value; a wrong file is off by the size of the output.
TYPICAL, SAME_CLASS = 0.05, 0.95


@dataclass(frozen=True)
class Grid:
    """Where a quantizer's values lie: (k - zero_point) scale + offset, k = 0 .. levels.

    Attributes:
        scale, zero_point, offset: (rows,) for a weight, () for an input; the zero point whole.
        levels: the largest k, at most 2^bits - 1.
        codes: k of every value of a weight, in its shape; None for an input.
    """

    scale: Tensor
    zero_point: Tensor
    offset: Tensor
    levels: int
    codes: Tensor | None = None

    @property
    def bits(self) -> int:
        return self.levels.bit_length()


def export(checkpoint: str | Path, to: str, *, out: str | Path | None = None, model: str | None = None) -> pd.DataFrame:
    """Write a checkpoint as `onnx` or `safetensors`; see `export_onnx` and `export_safetensors`.

    Args:
        checkpoint: a checkpoint file, or a run, of which the last checkpoint is taken.
        out: the file to write; None: beside the checkpoint, under its name.
        model: for a network of your own, `package.module:factory`.
    """
    if to not in FORMATS:
        raise UserError(f"Unknown format '{to}'{did_you_mean(to, FORMATS)}. Known: {', '.join(FORMATS)}.")
    path = Path(checkpoint)
    if path.is_dir():
        epochs = Run(path).checkpoints
        if not epochs:
            raise UserError(f"'{path}' holds no checkpoint (epoch_0000.pt, ...). Give a checkpoint file, or a run.")
        path = epochs[max(epochs)]
    with naming(f"'{path}'"):
        content = read_checkpoint(path)
        return FORMATS[to](content, Path(out) if out else path.with_suffix(f".{to}"), model)


def export_safetensors(content: Checkpoint, out: Path, model: str | None = None) -> pd.DataFrame:
    """Whole numbers, scales and zero points of every quantized tensor, and the rest in float, with metadata.

    Layer `conv1` becomes `conv1.weight` (whole numbers, uint8 or, above 8 bits, int32), `conv1.weight_scale`,
    `conv1.weight_zero_point`, `conv1.input_scale` and `conv1.input_zero_point`, and `..._offset` where there is one;
    biases and BatchNorm keep their names.

    Args:
        content: what `runs.checkpoint.read_checkpoint(path)` gives, of a network quantized by `quantize`.
        out: the file; an existing one is replaced in one step.
        model: for a network of your own, the `package.module:factory` it was trained with.

    Returns:
        One row: file, bytes, layers (quantized ones), tensors.

    Raises:
        UserError: if safetensors is not installed, or a quantizer's values do not lie on such a grid.
    """
    (safetensors,) = _need("safetensors.torch")
    net = content.build(model)
    weights, inputs = grids(net)
    tensors: dict[str, Tensor] = {}
    for layer, grid in weights.items():
        assert grid.codes is not None
        tensors[_join(layer, "weight")] = grid.codes.to(torch.uint8 if grid.bits <= 8 else torch.int32)
    for what, found in (("weight", weights), ("input", inputs)):
        for layer, grid in found.items():
            tensors[_join(layer, f"{what}_scale")] = grid.scale
            tensors[_join(layer, f"{what}_zero_point")] = grid.zero_point.to(torch.int32)
            if grid.offset.any():
                tensors[_join(layer, f"{what}_offset")] = grid.offset
    rest = {key: value for key, value in view(net, "float").state_dict().items() if key not in tensors}
    tensors |= {key: value for key, value in rest.items() if "input_quantizer" not in key.split(".")}
    bits = {_join(layer, "weight"): grid.bits for layer, grid in weights.items()}
    bits |= {_join(layer, "input"): grid.bits for layer, grid in inputs.items()}
    about = _metadata(content) | {
        "format": "pt",
        "meaning": "value = (weight - weight_zero_point) * weight_scale + weight_offset (if any), along axis 0",
        "bits": json.dumps(bits),
    }
    data = safetensors.save({key: value.contiguous() for key, value in tensors.items()}, metadata=about)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, lambda file: file.write(data))
    row = {"file": str(out), "bytes": len(data), "layers": len(weights.keys() | inputs.keys()), "tensors": len(tensors)}
    return pd.DataFrame([row])


def export_onnx(content: Checkpoint, out: Path, model: str | None = None) -> pd.DataFrame:
    """ONNX in QDQ form: each quantized input goes through Quantize- and DequantizeLinear, weights are stored as k.

    The file takes `images`, (batch, channels, size, size) in float32, normalised by the mean and standard deviation in
    its metadata, and gives `logits`, (batch, classes).  Before it is kept, onnxruntime runs it on random images.

    Args:
        content: what `runs.checkpoint.read_checkpoint(path)` gives, of a network quantized by `quantize`.
        out: the file; an existing one is replaced in one step.
        model: for a network of your own, the `package.module:factory` it was trained with.

    Returns:
        One row: file, bytes, layers (quantized ones), images (compared), same_class (share with the same answer),
        typical and largest (median and maximum over images of the largest difference in a logit, relative to the
        spread of the network's logits).

    Raises:
        UserError: if the packages are not installed, a quantizer's values do not lie on such a grid, the network is one
            that torch cannot export, or onnxruntime gives another output; then nothing is written.
    """
    onnx, ort, _ = _need("onnx", "onnxruntime", "onnxscript")
    net = content.build(model)
    weights, inputs = grids(net)
    size, channels = content.data["size"], content.model["in_channels"]
    images = torch.randn(N_CHECK, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    proto = _float_graph(view(net, "float"), images)
    _insert_quantizers(onnx, proto, weights, inputs)
    onnx.helper.set_model_props(proto, _metadata(content))
    proto.producer_name = "fpq-analysis"
    onnx.checker.check_model(proto)
    data = proto.SerializeToString()

    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        ours = net(images)
    gap = (theirs - ours).abs().amax(1) / ours.std()
    same = float((theirs.argmax(1) == ours.argmax(1)).float().mean())
    typical, largest = float(gap.median()), float(gap.max())
    if not (typical <= TYPICAL and same >= SAME_CLASS):
        raise UserError(
            f"onnxruntime and PyTorch disagree about this network: the typical difference of a logit is {typical:.2g} "
            f"of their spread, and {100 * same:.0f} % of {N_CHECK} answers are the same. Nothing was written. Does its "
            "forward() do something that depends on the images, or that export takes for a constant?"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, lambda file: file.write(data))
    row = {"file": str(out), "bytes": len(data), "layers": len(weights.keys() | inputs.keys()), "images": N_CHECK}
    return pd.DataFrame([{**row, "same_class": same, "typical": typical, "largest": largest}])


FORMATS: dict[str, Callable[[Checkpoint, Path, str | None], pd.DataFrame]] = {
    "onnx": export_onnx,
    "safetensors": export_safetensors,
}


@torch.no_grad()
def grids(model: nn.Module) -> tuple[dict[str, Grid], dict[str, Grid]]:
    """The grids of all weights and of all inputs, by name of the layer.

    They are checked against what the quantizers really give, so a quantizer of another kind is refused, not exported
    wrongly.

    Raises:
        UserError: if a quantizer's values are not of that form, or the model has no quantizers.
    """
    weights: dict[str, Grid] = {}
    inputs: dict[str, Grid] = {}
    layers = dict(model.named_modules())
    for name, quantizer, is_weight in quantizers(model):
        scale, zero = (getattr(quantizer, key, None) for key in ("step_size", "zero_point"))
        if not (isinstance(scale, Tensor) and isinstance(zero, Tensor)):
            raise _no_grid(name, quantizer, is_weight)
        # Of a zero point that is not whole, the broken part is an offset.
        offset = (zero.floor() - zero) * scale + getattr(quantizer, "offset", 0.0)
        zero = zero.floor()
        levels = quantizer.levels
        if is_weight:
            values = quantizer(latent_weight(layers[name]))
        else:
            values = quantizer(torch.arange(-2, levels + 2.01, 0.25) * scale - zero * scale + offset)
        codes = ((values - offset) / scale + zero).round()
        error = ((codes - zero) * scale + offset - values).abs().amax()
        if error > 1e-5 * scale.amax() * levels or codes.min() < 0 or codes.max() > levels:
            raise _no_grid(name, quantizer, is_weight)
        if is_weight:
            # One scale for all rows is given to each.
            scale, zero, offset = (x.flatten().expand(len(codes)).clone() for x in (scale, zero, offset))
            weights[name] = Grid(scale, zero, offset, levels, codes)
        else:
            inputs[name] = Grid(scale.clone(), zero.clone(), offset.clone(), int(codes.max()))
    if not (weights or inputs):
        raise UserError(
            "This is a float network, with nothing to export as integers. Give a checkpoint of a quantized run."
        )
    return weights, inputs


def _no_grid(name: str, quantizer: nn.Module, is_weight: bool) -> UserError:
    what = "weight" if is_weight else "input"
    return UserError(
        f"The {what} of '{name}' is quantized by {type(quantizer).__name__}, whose values are not whole numbers "
        "times one scale and an offset; neither QuantizeLinear nor the integer form can hold them."
    )


def _join(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _need(*packages: str) -> list[Any]:
    try:
        return [import_module(package) for package in packages]
    except ImportError as error:
        raise UserError(
            f"This export needs {' and '.join(package.partition('.')[0] for package in packages)} ({error}). Install "
            "what export needs: pip install 'fpq-analysis[export]'"
        ) from error


def _metadata(content: Checkpoint) -> dict[str, str]:
    """What a reader of the file must know; all values text, as both formats want."""
    quant = content.quant or {}
    about = {
        "model": content.model["name"],
        "method": content.run["method"],
        "bits_of_the_run": f"W{quant.get('weight_bits', 32)}A{quant.get('act_bits', 32)}",
        "epoch": content.epoch,
        "data": content.data["name"],
        "classes": json.dumps(content.data["classes"]),
        "mean": json.dumps(content.data["mean"]),
        "std": json.dumps(content.data["std"]),
        "checkpoint_sha256": content.sha256,
    }
    return {key: str(value) for key, value in about.items()}


def _float_graph(net: nn.Module, images: Tensor) -> Any:
    """The network without quantizers as an ONNX model whose initializers bear the names of the parameters."""
    try:
        program = torch.onnx.export(
            net,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # folding BatchNorm into a weight would take the weight off its grid
            verbose=False,
        )
    except Exception as error:  # the user's network: anything can happen
        text = str(error).strip().partition("\n")[0]
        raise UserError(f"torch cannot export this network to ONNX: {type(error).__name__}: {text}") from error
    assert program is not None
    return program.model_proto


def _insert_quantizers(onnx: Any, proto: Any, weights: dict[str, Grid], inputs: dict[str, Grid]) -> None:
    """Put QuantizeLinear and DequantizeLinear where the quantizers were; in place.

    Raises:
        UserError: if a layer's weight is not to be found in the graph.
    """
    graph = proto.graph
    before: dict[int, list[Any]] = {}  # position of a node to what comes ahead of it
    for layer in weights.keys() | inputs.keys():
        name = _join(layer, "weight")
        uses = list(_uses(graph, name))
        if not uses:
            raise UserError(f"'{name}' does not appear in the exported graph; a layer that does not run is no layer.")
        if layer in weights:
            grid = weights[layer]
            assert grid.codes is not None
            for tensor in [tensor for tensor in graph.initializer if tensor.name == name]:
                graph.initializer.remove(tensor)
            kind = _type(onnx, TYPES, grid)
            codes = grid.codes.flatten().int().tolist()
            graph.initializer.append(onnx.helper.make_tensor(f"{name}.codes", kind, grid.codes.shape, codes))
            ends = [f"{name}.codes", *_parameters(onnx, graph, name, grid, kind)]
            before.setdefault(0, []).extend(
                [
                    onnx.helper.make_node("DequantizeLinear", ends, [f"{name}.scaled"], axis=0),
                    *_shift(
                        onnx, graph, "Add", f"{name}.scaled", name, grid.offset.view(-1, *[1] * (grid.codes.ndim - 1))
                    ),
                ]
            )
        if layer in inputs:
            for use in uses:
                before.setdefault(use, []).extend(_input_nodes(onnx, graph, graph.node[use], layer, inputs[layer]))
    nodes = []
    for i, node in enumerate(graph.node):
        nodes += [*before.get(i, []), node]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # shapes of what was there before
    for node in graph.node:
        del node.metadata_props[:]  # stack traces, most of the file for a small network


def _uses(graph: Any, name: str) -> Iterator[int]:
    """Positions of the nodes that compute with the tensor `name`."""
    for i, node in enumerate(graph.node):
        if name in node.input:
            if node.op_type in PASSED:
                yield from _uses(graph, node.output[0])
            else:
                yield i


def _input_nodes(onnx: Any, graph: Any, node: Any, layer: str, grid: Grid) -> list[Any]:
    """Nodes that quantize the first input of `node`, and rewire it to them."""
    source, base = node.input[0], f"{_join(layer, 'input')}.{node.name or node.output[0]}"
    full = any(grid.levels == 2**bits - 1 for bits in TYPES)
    kind = _type(onnx, TYPES if full else CLIPPED_TYPES, grid)
    scale, zero = _parameters(onnx, graph, base, grid, kind)
    nodes = _shift(onnx, graph, "Sub", source, f"{base}.shifted", grid.offset)
    source = f"{base}.shifted"
    if not full:
        # Both bounds are on the grid, so clipping before rounding is clipping after it.
        bounds = [float((k - grid.zero_point) * grid.scale) for k in (0, grid.levels)]
        for end, value in zip(("low", "high"), bounds, strict=True):
            graph.initializer.append(onnx.helper.make_tensor(f"{base}.{end}", onnx.TensorProto.FLOAT, [], [value]))
        nodes.append(onnx.helper.make_node("Clip", [source, f"{base}.low", f"{base}.high"], [f"{base}.clipped"]))
        source = f"{base}.clipped"
    nodes.append(onnx.helper.make_node("QuantizeLinear", [source, scale, zero], [f"{base}.codes"]))
    nodes.append(onnx.helper.make_node("DequantizeLinear", [f"{base}.codes", scale, zero], [f"{base}.scaled"]))
    nodes += _shift(onnx, graph, "Add", f"{base}.scaled", f"{base}.values", grid.offset)
    node.input[0] = f"{base}.values"
    return nodes


def _shift(onnx: Any, graph: Any, op: str, source: str, target: str, offset: Tensor) -> list[Any]:
    """Nodes from tensor `source` to `target`: with `offset` added or subtracted, or with another name only."""
    if not offset.any():
        return [onnx.helper.make_node("Identity", [source], [target])]
    values = onnx.helper.make_tensor(
        f"{target}.offset", onnx.TensorProto.FLOAT, offset.shape, offset.flatten().tolist()
    )
    graph.initializer.append(values)
    return [onnx.helper.make_node(op, [source, f"{target}.offset"], [target])]


def _parameters(onnx: Any, graph: Any, base: str, grid: Grid, kind: int) -> tuple[str, str]:
    """Names of new initializers of scale and zero point, this of type `kind`."""
    shape, scale, zero = list(grid.scale.shape), grid.scale.flatten().tolist(), grid.zero_point.flatten().int().tolist()
    make = onnx.helper.make_tensor
    graph.initializer.append(make(f"{base}.scale", onnx.TensorProto.FLOAT, shape, scale))
    graph.initializer.append(make(f"{base}.zero_point", kind, shape, zero))
    return f"{base}.scale", f"{base}.zero_point"


def _type(onnx: Any, types: dict[int, str], grid: Grid) -> int:
    return int(getattr(onnx.TensorProto, next(name for bits, name in types.items() if grid.bits <= bits)))
