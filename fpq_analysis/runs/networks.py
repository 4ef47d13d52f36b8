"""Networks as the user's code makes them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from fpq_analysis.models import build_model, call_factory
from fpq_analysis.quantizers import has_adapter


def make_network(factory: str | Callable[..., nn.Module], name: str, num_classes: int, in_channels: int) -> nn.Module:
    """The network of a function, called `name` in errors, or of a name; see `models`."""
    if callable(factory):
        return call_factory(factory, name, num_classes, in_channels)
    return build_model(factory, num_classes, in_channels)


@functools.cache
def makes_quantized(factory: str | Callable[..., nn.Module], name: str, num_classes: int, in_channels: int) -> bool:
    """Whether another program's quantizers are in the network: its files do not say so, and it is made once to see."""
    return any(map(has_adapter, make_network(factory, name, num_classes, in_channels).modules()))
