"""Networks with some smooth parts: does the exact Gauss-Newton trace help to estimate the Hessian's?

    python benchmarks/control_variate.py

Tr H = Tr G + Tr R, see `probes/split_trace.py`.  On a network of convolutions with a few GELUs, trained on digits for
so many epochs, standard errors are compared at one cost: of H by random signs and deflated; of R likewise, and in the
block of those parameters alone in which the outputs are not piecewise linear (`method="split"` takes signs there).
Costs are counted in products, and two of the C - 1 backward passes of Tr G as one.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis import hessian_trace
from fpq_analysis.curvature import HessianOperator, ResidualOperator
from fpq_analysis.curvature.batches import as_batches
from fpq_analysis.curvature.residual import curved
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.linalg import Lanczos, deflated_hutchinson, hutchinson


def network(smooth: int) -> nn.Module:
    """Four convolutions and a classifier; the last `smooth` of four activations are GELUs."""
    layers: list[nn.Module] = []
    for i, (c_in, c_out) in enumerate([(1, 8), (8, 16), (16, 16), (16, 32)]):
        layers += [nn.Conv2d(c_in, c_out, 3, 1 + i % 2, 1), nn.GELU() if i >= 4 - smooth else nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """By Adam, on batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for places in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[places]), y[places]).backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-data", type=int, default=128)
    parser.add_argument("--n-products", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    x, y = training_sample(load_dataset("digits"), 1024, 0)
    data = x[: args.n_data], y[: args.n_data]
    print("smooth epochs    loss  Tr H   Tr G | se of H: signs deflated | of R: signs deflated | block: signs deflated")
    for smooth in (1, 2, 4):
        for epochs in (1, 5, 30):
            torch.manual_seed(0)
            model = trained(network(smooth), x, y, epochs)
            batches = as_batches(data, 128)
            named = dict(model.named_parameters())
            block = curved(model, batches, named)
            gauss_newton = hessian_trace(model, data, operator="gauss-newton", method="exact")
            passes = gauss_newton.n_products // 2
            whole = HessianOperator(model, F.cross_entropy, batches, named)
            rest = ResidualOperator(model, F.cross_entropy, batches, named)
            part = ResidualOperator(model, F.cross_entropy, batches, block)
            errors = []
            for matrix, n in ((whole, args.n_products), *((r, args.n_products - passes) for r in (rest, part))):
                blocks = [slice(0, matrix.size)]
                for deflated in (False, True):
                    found = []
                    for seed in range(args.seeds):
                        generator = torch.Generator().manual_seed(seed)
                        with_it = {"generator": generator, "n_products": n, "tol": None, "max_products": 10**5}
                        if deflated:
                            krylov = Lanczos(matrix, generator=generator)
                            estimate = deflated_hutchinson(matrix, blocks, krylov, **with_it)
                        else:
                            estimate = hutchinson(matrix, blocks, **with_it)
                        found.append(estimate)
                    errors.append(statistics.mean(one.sem for one in found))
                    if matrix is whole and deflated:
                        value = statistics.mean(one.value for one in found)
            loss = float(F.cross_entropy(model(data[0]), data[1]).detach())
            cells = " | ".join(f"{a:8.3f} {b:8.3f}" for a, b in zip(errors[::2], errors[1::2], strict=True))
            print(f"{smooth:6d} {epochs:6d} {loss:7.3f} {value:6.1f} {gauss_newton.value:6.1f} | {cells}", flush=True)


if __name__ == "__main__":
    main()
