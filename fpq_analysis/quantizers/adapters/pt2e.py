"""Graphs prepared for training by pt2e (`torchao.quantization.pt2e.prepare_qat_pt2e`), which have no layers.

What rounds a parameter becomes its quantizer, under the parameter's name; what rounds anything else becomes one of
activations.  A convolution ahead of a BatchNorm is as in `torch_ao.py`: w gamma / sigma is rounded, and the weight here
is Q(w gamma / sigma) sigma / gamma, which the graph goes on to multiply by gamma / sigma.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn.utils import parametrize
from torchao.quantization.pt2e import FakeQuantizeBase

from fpq_analysis.errors import UserError
from fpq_analysis.quantizers.adapters.adapter import UnknownQuantizerError, register_adapter
from fpq_analysis.quantizers.adapters.torch_ao import affine


@register_adapter(FakeQuantizeBase)
def fake_quantizer(module: Any) -> nn.Module:
    """Of activations."""
    return affine(module, None) or nn.Identity()


@register_adapter(GraphModule)
def graph(module: GraphModule) -> nn.Module:
    """A whole graph: its weights' quantizers are put on the modules that own the weights."""
    modules = dict(module.named_modules(remove_duplicate=False))
    node: Any
    for node in list(module.graph.nodes):
        if node.op != "call_module" or not isinstance(modules.get(node.target), FakeQuantizeBase):
            continue
        source = node.args[0]
        if not _of_inputs(source):
            parameter, factor = _scaled(source, module)
            owner, _, name = parameter.target.rpartition(".")
            layer = modules[owner]
            if name != "weight" or parametrize.is_parametrized(layer):
                raise UnknownQuantizerError(f"it rounds '{parameter.target}', or rounds it twice")
            weight = layer.weight.detach()
            scaled = weight if factor is None else weight * factor
            quantizer = affine(modules[node.target], scaled, factor)
            if quantizer is not None:
                used = quantizer(weight) if factor is None else quantizer(weight) * factor
                _check_weight(parameter.target, used, modules[node.target], scaled)
                parametrize.register_parametrization(layer, "weight", quantizer.eval())
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            module.delete_submodule(node.target)
    module.recompile()
    return module


@torch.no_grad()
def _scaled(node: Any, graph: GraphModule) -> tuple[Any, Tensor | None]:
    """A parameter, and what it is multiplied by before it is rounded."""
    if node.op == "get_attr":
        return node, None
    times = node.target is torch.ops.aten.mul.Tensor and isinstance(node.args[1], Node)
    if not times or node.args[0].op != "get_attr":
        raise UnknownQuantizerError("it rounds what was made of a weight otherwise than by a BatchNorm's slope")
    factor = _value(node.args[1], graph)
    if bool((factor == 0).any()):
        raise UserError("a BatchNorm's slope is zero, and the graph divides by it, so that its output is NaN")
    return node.args[0], factor


def _value(node: Any, graph: GraphModule) -> Tensor:
    """Of a node that depends on no input."""
    if node.op == "get_attr":
        return operator.attrgetter(node.target)(graph)
    given = map_arg((node.args, node.kwargs), lambda before: _value(before, graph))
    return node.target(*given[0], **given[1])


def _check_weight(name: str, ours: Tensor, quantizer: Any, weight: Tensor) -> None:
    """Here, as the quantizer goes: what is left are the weights themselves, which nobody calls."""
    close = 1e-5 * float(ours.abs().max())
    if weight.dtype == torch.float32 and not torch.allclose(ours, quantizer(weight), rtol=0, atol=close):
        raise UserError(f"the weight '{name}' is not what the graph uses")


def _of_inputs(node: Node) -> bool:
    """Whether a value depends on what the network is called with."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return True
        waiting += [before for before in node.all_input_nodes if before not in seen]
        seen.add(node)
    return False
