"""How a network is quantized, from its modules alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from fpq_analysis.methods import SCHEMES, load_class
from fpq_analysis.quantizers.apply import quantizers
from fpq_analysis.quantizers.others import other_quantizers
from fpq_analysis.quantspec import FLOAT_BITS


def quantization(model: nn.Module) -> tuple[str, dict[str, Any] | None]:
    """The scheme, and the bits but for the first and last layer's.

    The scheme is a key of `methods.SCHEMES`, "fp", or "quantized" for all others; then bits may be unknown (None).
    """
    found = list(quantizers(model))
    if not found:
        return "quantized" if any(True for _ in other_quantizers(model)) else "fp", None
    kinds = {is_weight: type(quantizer) for _, quantizer, is_weight in found}
    bits = {"weight_bits": FLOAT_BITS, "act_bits": FLOAT_BITS}
    for name, of_weight in (("weight_bits", True), ("act_bits", False)):
        own = [quantizer.bits for _, quantizer, is_weight in found if is_weight is of_weight]
        if own:
            bits[name] = Counter(own[1:-1] or own).most_common(1)[0][0]
    for scheme, row in SCHEMES.items():
        classes = {True: load_class(row.weight), False: load_class(row.activation)}
        if all(classes[which] is kind for which, kind in kinds.items()):
            return scheme, bits
    return "quantized", bits
