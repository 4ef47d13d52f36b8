"""Loss landscapes: the loss on lines and planes through weight space, with everything stated."""

from fpq_analysis.probes.landscape.api import Landscape, landscape
from fpq_analysis.probes.landscape.recipe import BATCHNORM, PLANES, WEIGHTS, Recipe

__all__ = ["BATCHNORM", "PLANES", "WEIGHTS", "Landscape", "Recipe", "landscape"]
