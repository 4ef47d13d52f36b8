from .config import TrainConfig as TrainConfig
from .csd import CSDLoss as CSDLoss
from .loop import train as train
from .sfp import StochasticFeaturePerturbation as StochasticFeaturePerturbation
from .sweep import Sweep as Sweep
from .sweep import read_sweep as read_sweep
from .sweep import run_sweep as run_sweep
from .sweep import sweep_status as sweep_status
