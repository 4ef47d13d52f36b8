"""Quantization-aware training: one config, one loop, one regulariser a file."""

from fpq_analysis.training.config import METHODS, TrainConfig
from fpq_analysis.training.loop import train
from fpq_analysis.training.sweep import Sweep, read_sweep, run_sweep, sweep_status

__all__ = ["METHODS", "Sweep", "TrainConfig", "read_sweep", "run_sweep", "sweep_status", "train"]
