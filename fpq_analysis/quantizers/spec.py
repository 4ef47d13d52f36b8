"""Which layers get how many bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fpq_analysis.errors import UserError

FLOAT_BITS = 32
MAX_BITS = 16


@dataclass(frozen=True)
class QuantSpec:
    """Bit widths and calibration of a quantized model.

    Attributes:
        weight_bits, act_bits: 2 to 16, or 32 for "leave in floating point".
        edge_bits: width of weights and inputs of the first and the last layer, where these are quantized at all.
        weight_calibration, act_calibration: `mse` or `minmax`, see `calibration.py`.
    """

    weight_bits: int
    act_bits: int
    edge_bits: int = 8
    weight_calibration: str = "mse"
    act_calibration: str = "mse"

    @classmethod
    def parse(cls, text: str, **options: Any) -> QuantSpec:
        """Read `W4A4` (4-bit weights, 4-bit activations); case does not matter.  `options` are the other fields.

        Raises:
            UserError: if the text has another form, or a width is neither 2..16 nor 32.
        """
        match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
        if match is None:
            raise UserError(
                f"'{text}' is not a bit width. Write WxAy, for example W4A4 or W2A4 (W: weights, A: inputs)."
            )
        weight_bits, act_bits = int(match[1]), int(match[2])
        for bits, what in ((weight_bits, "weights"), (act_bits, "activations")):
            if not (2 <= bits <= MAX_BITS or bits == FLOAT_BITS):
                raise UserError(
                    f"'{text}' asks for {bits}-bit {what}. Widths from 2 to {MAX_BITS} are defined here, and "
                    f"{FLOAT_BITS} for floating point. Examples: W4A4, W2A4, W8A8, W4A32."
                )
        return cls(weight_bits, act_bits, **options)

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.act_bits}"
