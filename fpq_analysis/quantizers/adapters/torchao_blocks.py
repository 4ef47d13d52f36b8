"""torchao's layers of block formats (MX, NVFP4), which cannot be differentiated twice."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchao.prototype.qat.mx import MXFakeQuantizedLinear
from torchao.prototype.qat.nvfp4 import NVFP4FakeQuantizedLinear

from fpq_analysis.errors import UserError
from fpq_analysis.quantizers.adapters.adapter import register_adapter


@register_adapter(MXFakeQuantizedLinear, NVFP4FakeQuantizedLinear)
def linear(layer: Any) -> nn.Module:
    """Refused: its backward takes weight and input for constants, so that the terms between layers are missing."""
    raise UserError(
        "its backward pass takes the weight for a constant, so that second derivatives lack the terms between layers. "
        'Measure the network without it (torchao\'s quantize_(model, QATConfig(step="convert")))'
    )
