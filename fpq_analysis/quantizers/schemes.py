"""The quantizers by name: which for weights, which for activations.  A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fpq_analysis.quantizers.base import Quantizer
from fpq_analysis.quantizers.lsq import LSQ
from fpq_analysis.quantizers.lsq_plus import LSQPlus, SymmetricLSQ
from fpq_analysis.quantizers.pact import PACT, DoReFa


@dataclass(frozen=True)
class Scheme:
    """A pair of quantizers.

    Attributes:
        weight: called with bits, number of rows and of dimensions.
        activation: called with bits.
        of_inputs: what the method learns of its inputs, if without quantized inputs it is another method.
    """

    weight: Callable[[int, int, int], Quantizer]
    activation: Callable[[int], Quantizer]
    of_inputs: str | None = None


SCHEMES = {
    "lsq": Scheme(LSQ, LSQ),
    "lsq+": Scheme(SymmetricLSQ, LSQPlus, of_inputs="an offset"),
    "pact": Scheme(DoReFa, PACT, of_inputs="a clipping level"),
}
