"""What every quantizer has, so that training, analysis and checkpoints need not know which one it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpq_analysis.methods import MethodSettings

# Step sizes and clipping levels are kept at or above this: a negative one would mirror the grid.
MIN_STEP = 1e-6


class Quantizer(nn.Module):
    """Quantize and dequantize: the output lies on the grid (k - z) s, k = 0 .. 2^bits - 1.

    A subclass sets the state (all of it parameters and buffers, so that a state dict is the whole truth) and fills in
    `quantize`, `calibrate` and `clipped`.  Until `calibrate` is called or a state is loaded, its scale is NaN: a
    forgotten calibration is loud, and a loaded scale is never overwritten.

    Attributes:
        elementwise: each output depends on the input at the same place only (what the latent Hessian's mask needs).
        levels: number of steps of the grid, 2^bits - 1.
        step_size, zero_point: s and z, of shape () or (rows, 1, ..., 1).
        fused: use the fast form, where there is one, although it can be differentiated in the step size but once (set
            by the trainer).  Where the step size is not differentiated, the fast form is used anyway.
        observing: None, or the calibration to run on the next input.
    """

    elementwise = True
    step_size: Tensor
    zero_point: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.levels = 2**bits - 1
        self.fused = False
        self.observing: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, on the grid; at least float32."""
        if self.observing is not None:
            self.calibrate(x, self.observing)
        return self.quantize(widened(x))  # the layer that follows casts back by itself

    def quantize(self, x: Tensor) -> Tensor:
        """`x` on the grid, with the method's straight-through derivatives."""
        raise NotImplementedError

    def calibrate(self, x: Tensor, how: str) -> None:
        """Set scale and zero point from `x` by `how`, a key of `calibration.CALIBRATIONS`."""
        raise NotImplementedError

    def clipped(self, x: Tensor) -> Tensor:
        """Boolean mask, shape of x: which values fall outside the grid's range (and so get no gradient)."""
        raise NotImplementedError

    @torch.no_grad()
    def position(self, x: Tensor) -> Tensor:
        """Where `x` lies among the codes, in steps and before rounding: x/s + z, or as the subclass says.

        In range, `codes` is this rounded; a rounding threshold lies halfway between any two neighbouring codes.
        """
        return x / self.step_size + self.zero_point

    def scales(self) -> list[nn.Parameter]:
        """The learned parameters that must stay positive."""
        return []

    def penalties(self, settings: MethodSettings) -> dict[str, Tensor]:
        """What training adds to the loss for this quantizer: name of the term to its weighted value, a scalar."""
        return {}

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The whole number k each value of `x` is stored as, shape of x; uint8 up to eight bits, else int32."""
        k = (self(x) / self.step_size + self.zero_point).round()
        return k.to(torch.uint8 if self.bits <= 8 else torch.int32)

    def extra_repr(self) -> str:
        """Bits and number of step sizes."""
        return f"bits={self.bits}, step_sizes={self.step_size.numel()}"


def widened(x: Tensor) -> Tensor:
    """At least float32: half precision carries too few digits for x/s."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
