"""Quantization-aware training: one config, one loop, one regulariser a file."""

from fpq_analysis.training.config import METHODS, TrainConfig
from fpq_analysis.training.loop import train

__all__ = ["METHODS", "TrainConfig", "train"]
