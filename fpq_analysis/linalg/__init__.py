"""Matrix-free algorithms: they take products with vectors and know no model."""

from fpq_analysis.linalg.eigs import Eigenpairs as Eigenpairs
from fpq_analysis.linalg.eigs import eigenpairs as eigenpairs
from fpq_analysis.linalg.estimate import Estimate as Estimate
from fpq_analysis.linalg.hutchinson import deflated_hutchinson as deflated_hutchinson
from fpq_analysis.linalg.hutchinson import hutchinson as hutchinson
from fpq_analysis.linalg.hutchpp import Sketch as Sketch
from fpq_analysis.linalg.lanczos import Lanczos as Lanczos
from fpq_analysis.linalg.matrix import DenseMatrix as DenseMatrix
from fpq_analysis.linalg.matrix import Matrix as Matrix
from fpq_analysis.linalg.slq import SpectralMeasure as SpectralMeasure
from fpq_analysis.linalg.slq import spectral_measure as spectral_measure
from fpq_analysis.linalg.xtrace import xnystrace as xnystrace
from fpq_analysis.linalg.xtrace import xtrace as xtrace
