"""Which layers get which quantizer, with how many bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.methods import SCHEMES

FLOAT_BITS = 32
MAX_BITS = 16


@dataclass(frozen=True)
class QuantSpec:
    """Quantizers, bit widths and calibration of a quantized model.

    Attributes:
        weight_bits, act_bits: 2 to 16, or 32 for "leave in floating point".
        edge_bits: width of weights and inputs of the first and the last layer, where these are quantized at all.
        weight_calibration, act_calibration: `mse` or `minmax` (docs/calibration.md).  The weights of `lsq+` and `pact`
            have a rule of their own in its place.
        scheme: the quantizers, a key of `methods.SCHEMES`.

    Raises:
        UserError: if a width or the scheme is not defined, or the scheme is not defined for these widths.
    """

    weight_bits: int
    act_bits: int
    edge_bits: int = 8
    weight_calibration: str = "mse"
    act_calibration: str = "mse"
    scheme: str = "lsq"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            known = f"Known: {', '.join(SCHEMES)}."
            raise UserError(f"Unknown quantizer '{self.scheme}'{did_you_mean(self.scheme, SCHEMES)}. {known}")
        named = ((self.weight_bits, "weights"), (self.act_bits, "activations"), (self.edge_bits, "edge layers"))
        for bits, what in named:
            if not (2 <= bits <= MAX_BITS or bits == FLOAT_BITS):
                raise UserError(
                    f"'{self}' asks for {bits}-bit {what}. Widths from 2 to {MAX_BITS} are defined here, and "
                    f"{FLOAT_BITS} for floating point; one bit takes quantizers of another kind, for LSQ+ and PACT "
                    "too. Examples: W4A4, W2A4, W8A8, W4A32."
                )
        of_inputs = SCHEMES[self.scheme].of_inputs
        if of_inputs and self.act_bits == FLOAT_BITS != self.weight_bits:
            raise UserError(
                f"'{self}' leaves the inputs in floating point, and {self.scheme} is the quantizer that learns "
                f"{of_inputs} of quantized inputs, so it is not defined there. Give the inputs a width, as in "
                f"W{self.weight_bits}A4, or quantize weights alone with lsq."
            )

    @classmethod
    def parse(cls, text: str, **options: Any) -> QuantSpec:
        """Read `W4A4` (4-bit weights, 4-bit activations); case does not matter.  `options` are the other fields.

        Raises:
            UserError: if the text has another form, or see the class.
        """
        match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
        if match is None:
            raise UserError(
                f"'{text}' is not a bit width. Write WxAy, for example W4A4 or W2A4 (W: weights, A: inputs)."
            )
        return cls(int(match[1]), int(match[2]), **options)

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.act_bits}"
