"""How often does the stated 95 % interval of each trace estimator hold the true trace?

Dense symmetric matrices of prescribed spectra, turned by random rotations; every estimator at a fixed number of
products and stopped at a relative error, over many seeds.  Beside them PyHessian's rule: probes until the running mean
moves by less than 1e-3, of at most 100; it states no interval, so the share of its results within 1 % and 5 % of the
truth is shown, and that of ours at the same tolerance.

    python benchmarks/coverage.py [--seeds 200] [--size 200]
"""

from __future__ import annotations

import argparse
import math

import pandas as pd
import torch
from torch import Tensor

from fpq_analysis.linalg import (
    DenseMatrix,
    Estimate,
    Lanczos,
    Sketch,
    deflated_hutchinson,
    hutchinson,
    xnystrace,
    xtrace,
)

TOLERANCES = (0.05, 0.02)
MAX_PRODUCTS = 5000


def spectra(n: int) -> dict[str, Tensor]:
    """Eigenvalues by name; the first four are positive."""
    i = torch.arange(n, dtype=torch.float64)
    flat = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    one = torch.cat([torch.tensor([float(n)], dtype=torch.float64), flat[1:]])
    alternating = (-1.0) ** i / (1 + i)
    return {
        "fast decay": 0.8**i,
        "power law": 1 / (1 + i),
        "flat": flat,
        "one outlier": one,
        "negative trace": torch.where(i % 4 == 0, 1.0, -1.5) / (1 + i).sqrt(),
        "cancelling": alternating - alternating.mean() + 0.05 * alternating.abs().mean(),
    }


def rotated(eigenvalues: Tensor, seed: int) -> Tensor:
    """A dense matrix with these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    a = (q * eigenvalues) @ q.T
    return (a + a.T) / 2


def estimate(method: str, matrix: DenseMatrix, seed: int, budget: int, tol: float | None) -> Estimate:
    """One run of one estimator."""
    blocks = [slice(0, matrix.size)]
    generator = torch.Generator().manual_seed(seed)
    if method == "hutchinson":
        return hutchinson(matrix, blocks, generator=generator, n_products=budget, tol=tol, max_products=MAX_PRODUCTS)
    if method in ("xtrace", "xnystrace"):
        run = xtrace if method == "xtrace" else xnystrace
        return run(matrix, blocks, generator=generator, n_products=budget, tol=tol)
    subspace = (Lanczos if method == "deflated" else Sketch)(matrix, generator=generator)
    return deflated_hutchinson(matrix, blocks, subspace, generator=generator, n_products=budget, tol=tol)


METHODS = ("hutchinson", "deflated", "hutch++", "xtrace", "xnystrace")


def pyhessian_rule(a: Tensor, seed: int, tol: float = 1e-3, most: int = 100) -> tuple[float, int]:
    """PyHessian's stopping rule, written from its description: until the running mean moves less than `tol`."""
    generator = torch.Generator().manual_seed(seed)
    draws: list[float] = []
    mean = 0.0
    for _ in range(most):
        v = torch.randint(0, 2, (len(a),), generator=generator).double().mul_(2).sub_(1)
        draws.append(float(v @ a @ v))
        new = sum(draws) / len(draws)
        if abs(new - mean) / (mean + 1e-6) < tol:
            return new, len(draws)
        mean = new
    return mean, len(draws)


def table(seeds: int, size: int, budget: int) -> pd.DataFrame:
    """A row for each spectrum, estimator and way of stopping."""
    rows = []
    for name, eigenvalues in spectra(size).items():
        truth = float(eigenvalues.sum())
        a = rotated(eigenvalues, 1)
        for method in METHODS:
            if method == "xnystrace" and eigenvalues.min() < 0:
                continue
            for tol in (None, *TOLERANCES):
                found = []
                for seed in range(seeds):
                    matrix = DenseMatrix(a)
                    e = estimate(method, matrix, seed, budget, tol)
                    assert e.n_products == matrix.n_products
                    found.append((abs(e.value - truth), e.half_width(), e.n_products))
                miss, half, products = (
                    torch.tensor(column, dtype=torch.float64) for column in zip(*found, strict=True)
                )
                covered = float((miss <= half + 1e-9 * abs(truth)).double().mean())
                rows.append(
                    {
                        "spectrum": name,
                        "method": method,
                        "stop": f"{budget} products" if tol is None else f"tol {tol}",
                        "covered": covered,
                        "products": float(products.mean()),
                        "rms error": float(miss.square().mean().sqrt() / abs(truth)),
                    }
                )
        found = [pyhessian_rule(a, seed) for seed in range(seeds)]
        miss = torch.tensor([abs(value - truth) for value, _ in found], dtype=torch.float64)
        rows.append(
            {
                "spectrum": name,
                "method": "PyHessian's rule",
                "stop": "its own, 1e-3",
                "covered": math.nan,
                "products": sum(n for _, n in found) / len(found),
                "rms error": float(miss.square().mean().sqrt() / abs(truth)),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--budget", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.seeds} seeds, {args.size} x {args.size} matrices; stated 95 % intervals")
    print(table(args.seeds, args.size, args.budget).to_string(index=False, float_format=lambda x: f"{x:.3g}"))
