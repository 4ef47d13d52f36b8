"""Loss landscapes: the loss on lines and planes through weight space, with everything stated."""

from fpq_analysis.landscapes.api import Landscape, landscape
from fpq_analysis.landscapes.recipe import BATCHNORM, PLANES, WEIGHTS, Recipe
from fpq_analysis.landscapes.study import measure_landscapes

__all__ = ["BATCHNORM", "PLANES", "WEIGHTS", "Landscape", "Recipe", "landscape", "measure_landscapes"]
