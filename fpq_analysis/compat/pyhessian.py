"""PyHessian's class (Yao et al. 2020, arXiv:1912.07145): scripts that use it gain by changing one import line.

    from fpq_analysis.compat.pyhessian import hessian        # instead of: from pyhessian import hessian

Same constructor, methods and return shapes.  What differs: results are converged or say that they are not; the model is
left as it was; it works on CPU and CUDA alike; parameters that the loss does not use, ragged batches and negative
traces are measured rightly; densities work on torch 2.  See docs/from_pyhessian.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.curvature import as_batches
from fpq_analysis.curvature.batches import Batch
from fpq_analysis.curvature.operator import Loss
from fpq_analysis.errors import UserError
from fpq_analysis.probes import hessian_eigs, hessian_trace, spectral_density


class hessian:
    """The Hessian of `criterion` on one batch, or on all batches of a loader."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Loss,
        data: Batch | None = None,
        dataloader: Iterable[Batch] | None = None,
        cuda: bool = True,
        seed: int = 0,
    ) -> None:
        """Take what is to be measured.

        Args:
            model: measured in eval mode, as a copy, on the device it is on.
            criterion: (outputs, targets) to the mean over the batch.
            data: one batch (inputs, targets); or
            dataloader: an iterable of such batches, gone through once, here.
            cuda: as in PyHessian, but without effect: the model's device counts.
            seed: of random vectors (PyHessian draws from the global generator).

        Raises:
            UserError: unless exactly one of `data` and `dataloader` is given.
        """
        if (data is None) == (dataloader is None):
            raise UserError("Give either data=(inputs, targets) or dataloader=..., one of the two.")
        self.model = model
        self.batches = as_batches(data if data is not None else list(dataloader or []))
        self.settings: dict[str, Any] = {"loss": criterion, "seed": seed}

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """The `top_n` eigenvalues of largest magnitude, and their eigenvectors.

        Args:
            maxIter: products with vectors for each eigenvalue at most.
            tol: relative residual |H v - value v| / |value| (PyHessian: relative change between iterations).

        Returns:
            Eigenvalues; and for each a list of tensors shaped like the model's parameters, in their order, of length 1
            together.  A value that did not converge is warned of.
        """
        found = hessian_eigs(
            self.model,
            self.batches,
            top_n,
            which="LM",
            tol=tol,
            eigenvectors=True,
            max_products=maxIter * top_n,
            **self.settings,
        )
        if not found.converged.all():
            warnings.warn(
                f"{int((~found.converged).sum())} of {top_n} eigenvalues have a relative residual above {tol:g}; "
                "raise maxIter.",
                stacklevel=2,
            )
        assert found.vectors is not None
        order = [name for name, p in self.model.named_parameters() if name in found.vectors and p.requires_grad]
        order += [name for name in found.vectors if name not in order]  # weights behind a quantizer
        return found.values.tolist(), [[found.vectors[name][i] for name in order] for i in range(len(found.values))]

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Numbers whose mean is the trace.

        Their standard deviation over the root of their number is its standard error: over the data where the exact
        method holds (one number an image), over the probes elsewhere.

        Args:
            maxIter: products with vectors, where the exact method does not hold.
            tol: without effect; PyHessian's rule, to stop when the mean moves less, says nothing of the error.
        """
        found = hessian_trace(self.model, self.batches, n_products=max(4, maxIter), **self.settings)
        return found.draws.tolist()

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Nodes and weights of stochastic Lanczos quadrature: `n_v` lists of `iter` numbers each."""
        found = spectral_density(self.model, self.batches, runs=n_v, steps=iter, **self.settings)
        return found.nodes.tolist(), found.weights.tolist()


def get_params(model_orig: nn.Module, model_perb: nn.Module, direction: list[Tensor], alpha: float) -> nn.Module:
    """Set `model_perb`'s parameters to `model_orig`'s plus `alpha` times a direction, as PyHessian's tutorial does."""
    with torch.no_grad():
        for original, moved, d in zip(model_orig.parameters(), model_perb.parameters(), direction, strict=True):
            moved.copy_(original + alpha * d)
    return model_perb
