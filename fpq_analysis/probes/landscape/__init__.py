"""Loss landscapes: the loss on lines and planes through weight space, with everything stated."""

from fpq_analysis.probes.landscape.api import Landscape, LandscapeSettings, landscape
from fpq_analysis.probes.landscape.choices import BATCHNORM, PLANES, WEIGHTS

__all__ = ["BATCHNORM", "PLANES", "WEIGHTS", "Landscape", "LandscapeSettings", "landscape"]
