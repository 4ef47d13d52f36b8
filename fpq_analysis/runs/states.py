"""State dicts in the files of any program, under the names that a network's own state has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fpq_analysis.errors import UserError
from fpq_analysis.runs import checkpoint as ckpt
from fpq_analysis.runs.checkpoint import COUNTER

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")  # under which a state dict is kept
# What torch.compile, FSDP and activation checkpointing put into the names of tensors.
WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_content(path: Path) -> Any:
    """What a file of tensors and plain values holds; of a safetensors file, its tensors.

    Raises:
        UserError: if it is missing, damaged, or holds code; or safetensors is not installed.
    """
    if path.suffix != ".safetensors":
        return ckpt.load_tensors(path)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"'{path}' needs safetensors to be read ({error}). Install it: pip install 'fpq-analysis[export]'"
        ) from error
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"No checkpoint '{path}'.") from error
    except SafetensorError as error:
        raise UserError(
            f"'{path}' cannot be read: it is cut short or damaged ({error}). Copy it again from its source."
        ) from error


def find_state(content: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in what a program saved, and the keys under which it was; ({}, ()) if there is none.

    Of several under other names than `WRAPPERS` it is not known which is meant: that is none, too.
    """
    if not isinstance(content, dict) or not content:
        return {}, ()
    if all(isinstance(value, Tensor) for value in content.values()):
        return dict(content), ()
    for key in WRAPPERS:
        state, keys = find_state(content.get(key))
        if state:
            return state, (key, *keys)
    # Under any other name, if it is the only one: an optimizer's state holds numbers beside tensors.
    others = [key for key, value in content.items() if isinstance(value, dict) and _is_state(value)]
    return (dict(content[others[0]]), (others[0],)) if len(others) == 1 else ({}, ())


def _is_state(content: dict[Any, Any]) -> bool:
    return bool(content) and all(isinstance(key, str) and isinstance(t, Tensor) for key, t in content.items())


def align(state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` under the names that the model's `own` state has.

    Removed are what `torch.compile` and FSDP put into names, and what stands before all names (`module.` of
    DataParallel, `model.` or `net.` of a LightningModule, whose further tensors are then left behind).  Counters of
    batches that an old file lacks are taken from `own`.

    Raises:
        UserError: if several prefixes fit.
    """
    state = {WRAPPED.sub("", key): value for key, value in state.items()}
    wanted = [key for key in own if not key.endswith(COUNTER)]
    fits = {prefix: sum(prefix + key in state for key in wanted) for prefix in _prefixes(state, wanted)}
    best = [prefix for prefix, number in fits.items() if number == max(fits.values())]
    if len(best) > 1 and "" not in best and fits[best[0]] == len(wanted):
        raise UserError(
            f"'{path}' holds several networks of this form, under {' and '.join(map(repr, best))}, and which one is "
            "meant is not known. Save the state_dict() of one alone."
        )
    prefix = "" if not best or "" in best else best[0]
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    counters = {key: value for key, value in own.items() if key.endswith(COUNTER)}
    return counters | found


def _prefixes(state: dict[str, Tensor], wanted: list[str]) -> Iterator[str]:
    """What may stand before all the names in `wanted`: "", and whatever stands before the first that occurs."""
    yield ""
    for key in wanted:
        found = [name.removesuffix(key) for name in state if name.endswith(f".{key}")]
        if found:
            yield from found
            return


def channels_of(state: dict[str, Tensor]) -> int:
    """Channels of the images that the network takes, by its first convolution; 0 for a network without one."""
    return next((t.shape[1] for t in state.values() if t.ndim == 4), 0)
