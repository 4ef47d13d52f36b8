"""Graphs prepared for training by pt2e (`torchao.quantization.pt2e.prepare_qat_pt2e`), which have no layers.

What rounds a parameter becomes its quantizer, under the parameter's name; what rounds anything else becomes one of
activations.  A weight that is rounded after it was scaled, as with the BatchNorm behind it, is not known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
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
    modules = dict(module.named_modules())
    for node in list(module.graph.nodes):
        if node.op != "call_module" or not isinstance(modules.get(node.target), FakeQuantizeBase):
            continue
        source = node.args[0]
        if source.op == "get_attr":
            owner, _, name = source.target.rpartition(".")
            layer = modules[owner]
            if name != "weight" or parametrize.is_parametrized(layer):
                raise UnknownQuantizerError(f"it rounds '{source.target}', or rounds it twice")
            weight = layer.weight.detach()
            quantizer = affine(modules[node.target], weight)
            if quantizer is not None:
                _check_weight(source.target, quantizer(weight), modules[node.target], weight)
                parametrize.register_parametrization(layer, "weight", quantizer.eval())
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            module.delete_submodule(node.target)
        elif not _of_inputs(source):
            raise UnknownQuantizerError("it rounds a weight that was scaled before, as with a BatchNorm behind it")
    module.recompile()
    return module


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
