"""Matrix-free algorithms: they take products with vectors and know no model."""

from fpq_analysis.linalg.eigs import Eigenpairs, eigenpairs
from fpq_analysis.linalg.estimate import Estimate
from fpq_analysis.linalg.hutchinson import deflated_hutchinson, hutchinson
from fpq_analysis.linalg.hutchpp import Sketch
from fpq_analysis.linalg.lanczos import Lanczos
from fpq_analysis.linalg.matrix import DenseMatrix, Matrix
from fpq_analysis.linalg.slq import SpectralMeasure, spectral_measure
from fpq_analysis.linalg.xtrace import xnystrace, xtrace

__all__ = [
    "DenseMatrix",
    "Eigenpairs",
    "Estimate",
    "Lanczos",
    "Matrix",
    "Sketch",
    "SpectralMeasure",
    "deflated_hutchinson",
    "eigenpairs",
    "hutchinson",
    "spectral_measure",
    "xnystrace",
    "xtrace",
]
