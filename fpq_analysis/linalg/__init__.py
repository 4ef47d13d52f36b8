"""Matrix-free algorithms: they take a product with vectors and know no model."""

from fpq_analysis.linalg.hutchinson import hutchinson

__all__ = ["hutchinson"]
