"""How often the certificate of the exact trace is wrong, on random networks that hide what bends them.

    python benchmarks/certificate.py --networks 2000

Half of the networks are piecewise linear by construction, half have one bend: a smooth activation, a product of what
one layer gives with itself, a layer called twice, a custom Function ... (`tests/hidden.py`).  Layers and inputs of half
of them are of sizes from 1e-8 to 1e8; they are of float64, float32 and bfloat16.  Printed are bent networks that were
certified, piecewise linear ones that were not, and, of those in float64 throughout, the largest difference of the exact
trace from that of a dense Hessian.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from fpq_analysis.curvature import NotExactError, certify, per_sample_traces
from fpq_analysis.losses.cross_entropy import CROSS_ENTROPY
from tests.hidden import network
from tests.nets import dense_hessian


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=2000, help="how many (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (0)")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    worst = 0.0
    for seed in range(args.seed, args.seed + args.networks):
        model, x, y, bend = network(seed)
        parameters = dict(model.named_parameters())
        kind = "bent" if bend else "piecewise linear"
        try:
            certify(model, [(x, y)], parameters)
            parts = next(per_sample_traces(model, CROSS_ENTROPY, [(x, y)], parameters))
        except NotExactError as error:
            counts[f"{kind}, refused"] += 1
            if not bend:
                print(f"{seed}: piecewise linear, refused: {error}")
            continue
        counts[f"{kind}, certified"] += 1
        if bend:
            print(f"{seed}: '{bend}' certified")
        elif x.dtype == torch.float64 and not any(getattr(module, "name", "") == "cast" for module in model):
            try:
                truth = float(dense_hessian(model, list(parameters.values()), x, y).trace())
            except RuntimeError:  # hardsigmoid has no second derivative in torch
                counts["(without a dense Hessian)"] += 1
                continue
            value = float(sum(part.mean() for part in parts.values()))
            error = abs(value - truth) / (abs(truth) or 1.0)
            worst = max(worst, error)
            if error > 1e-9:
                print(f"{seed}: {value} where the dense Hessian gives {truth}")
    for name, n in sorted(counts.items()):
        print(f"{n:6} {name}")
    print(f"largest relative difference from a dense Hessian: {worst:.1e}")


if __name__ == "__main__":
    main()
