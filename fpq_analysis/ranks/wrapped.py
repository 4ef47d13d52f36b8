"""The network behind what training wraps it in: DistributedDataParallel, `fully_shard` (FSDP2), torch.compile.

A wrapper acts on gradients, or on weights, while derivatives are taken: products through one are wrong.  Of a network
whose weights are divided over ranks a whole copy is made on each; a product needs all weights at once anyway.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from fpq_analysis.errors import UserError
from fpq_analysis.ranks.division import dividing, on_first

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain network: the model itself, or the one in its wrappers; neither is changed.

    Inside `over_ranks()` the buffers of what was wrapped for several ranks (BatchNorm's statistics, which each rank has
    of its own) are the first rank's, as in a checkpoint.

    Raises:
        UserError: if a wrapper stands further inside, or weights are divided in a way that cannot be undone here.
    """
    outer = model
    while isinstance(model, WRAPPERS) or type(model).__name__ == "OptimizedModule":
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod  # type: ignore[assignment]
    for name, part in model.named_modules():
        if isinstance(part, WRAPPERS) or type(part).__name__ == "FullyShardedDataParallel":
            raise UserError(
                f"{f'The module {name!r} of the network' if name else 'The network'} is wrapped in "
                f"{type(part).__name__}, which products of the Hessian do not pass through. Hand over the network "
                "without it, with its full state dict. Networks in fully_shard (FSDP2), and those in one outermost "
                "DistributedDataParallel, are taken as they are."
            )
    if any(_is_divided(t) for t in chain(model.parameters(), model.buffers())) or any(_sharded_modules(model)):
        model = _whole(model)
    elif not (dividing() and isinstance(outer, nn.parallel.DistributedDataParallel)):
        return model
    else:
        model = copy.deepcopy(model)
    buffers = list(model.buffers())
    for buffer, first in zip(buffers, on_first(lambda: [t.cpu() for t in buffers]), strict=True):
        buffer.copy_(first)
    return model


def _is_divided(t: Tensor) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # not loaded: not used
    return tensors is not None and isinstance(t, tensors.DTensor)


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (m for m in model.modules() if fsdp is not None and isinstance(m, fsdp.FSDPModule))


def _whole(model: nn.Module) -> nn.Module:
    """A copy with whole, plain weights, and without what `fully_shard` put into the modules."""
    if not dividing():
        raise UserError(
            "The weights of this network are divided over ranks. Measure it inside `with over_ranks():`, in which all "
            "ranks make the same call."
        )
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed.fsdp import FSDPModule

    copied: dict[int, Any] = {}  # what deepcopy takes for copies it has made
    for module in _sharded_modules(model):
        module.reshard()  # whole weights may be there in another precision
        for key in (REGISTRY_KEY, STATE_KEY):
            copied[id(vars(module).get(key, model))] = {}
    copied.pop(id(model), None)
    for module in model.modules():
        for hook in chain(module._forward_pre_hooks.values(), module._forward_hooks.values()):
            origin = str(getattr(hook, "__module__", ""))
            if origin.startswith("torch.distributed.tensor"):
                raise UserError(_UNKNOWN)
            if origin.startswith("torch.distributed.fsdp"):
                copied[id(hook)] = _nothing
    covered = {id(p) for module in _sharded_modules(model) for p in module.parameters()}
    for p in chain(model.parameters(), model.buffers()):
        if _is_divided(p):
            divided: Any = p
            if id(p) not in covered or not all(one.is_replicate() for one in divided.placements[:-1]):
                raise UserError(_UNKNOWN)
            whole = divided.detach().full_tensor()
            copied[id(p)] = nn.Parameter(whole, p.requires_grad) if isinstance(p, nn.Parameter) else whole
    shells = {}
    for module in _sharded_modules(model):
        plain: Any = type(module).__mro__[type(module).__mro__.index(FSDPModule) + 1]
        copied[id(module)] = shells[module] = plain.__new__(plain)
    for module, shell in shells.items():
        vars(shell).update({key: copy.deepcopy(value, copied) for key, value in vars(module).items()})
    return copy.deepcopy(model, copied)


_UNKNOWN = (
    "The weights of this network are divided over ranks in another way than by fully_shard alone (tensor parallelism, "
    "perhaps), which is not known here. Hand over a plain network with the full state dict "
    "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)."
)


def _nothing(*args: object, **kwargs: object) -> None:
    """In the place of a hook."""
