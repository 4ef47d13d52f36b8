"""A network outside the exact condition: products to a standard error of 1 % in the trace.

    python benchmarks/smooth.py

A ResNet-20 with GELU instead of ReLU, trained on digits.  Ours runs with tol=0.01 to its end, with each method.
Hutchinson's products are those its law gives from the spread of its draws: (spread / 1 % of the trace)^2.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from _common import environment
from torch import nn

from fpq_analysis import TrainConfig, hessian_trace, load, train
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.models import resnet20


def gelu_resnet20(num_classes: int, in_channels: int) -> nn.Module:
    """ResNet-20 with every ReLU replaced."""
    model = resnet20(num_classes, in_channels)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--n-data", type=int, default=256)
    parser.add_argument("--tol", type=float, default=0.01)
    parser.add_argument("--methods", default="deflated,hutch++,xtrace")
    args = parser.parse_args()
    where = environment(torch.device("cpu"), "fpq-analysis")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(model="smooth:gelu_resnet20", epochs=args.epochs, batch_size=128, lr=0.1)
        train(config, folder, device="cpu", log=lambda line: None)
        model = load(Path(folder) / f"epoch_{args.epochs:04d}.pt", "smooth:gelu_resnet20")
    data = load_dataset("digits")
    images = training_sample(data, args.n_data, 0)
    plain = hessian_trace(model, images, method="hutchinson", n_products=60)
    value = plain.value
    for method in args.methods.split(","):
        start = time.perf_counter()
        found = hessian_trace(model, images, method=method, tol=args.tol)
        spent = time.perf_counter() - start
        value = found.value
        print(
            f"{method:10} {found.value:9.2f} ± {found.sem:.2f} (95 %: ± {found.ci95:.2f}), {found.n_products} "
            f"products, {spent:.0f} s, converged: {found.converged}"
        )
    spread = plain.sem * 60**0.5
    needed = (spread / (args.tol * value)) ** 2
    print(f"hutchinson {plain.value:9.2f} ± {plain.sem:.2f} with 60; by its law {needed:.0f} products (± 20 %)")
    print(*where.values(), sep="\n")


if __name__ == "__main__":
    main()
