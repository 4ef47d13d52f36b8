"""Front ends: the fake quantizers of other programs, one a file, as quantizers of ours."""

from fpq_analysis.quantizers.adapters.adapter import adopt as adopt
from fpq_analysis.quantizers.adapters.adapter import has_adapter as has_adapter
from fpq_analysis.quantizers.adapters.adapter import plain_layer as plain_layer
from fpq_analysis.quantizers.adapters.adapter import register_adapter as register_adapter
