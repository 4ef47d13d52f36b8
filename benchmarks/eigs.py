"""Eigenvalues, density and deflated trace: this package, PyHessian, and curvlinops with SciPy, in one run.

    python benchmarks/eigs.py --model resnet18 --images 16
    python benchmarks/eigs.py --ckpt RUN/epoch_0020.pt --images 128     # a trained network, on its own data
    python benchmarks/eigs.py --ckpt RUN/epoch_0020.pt --trajectory     # and its run's checkpoints, cold and warm

Every method runs in a process of its own, alone, on the same network, images and parameters, in float32.

Eigenvalues: ours and eigsh stop at a relative residual of `--tol`.  PyHessian has no residual: it stops when an
eigenvalue changes by less than `--tol` between two iterations, or after 100.  What each has reached is measured
afterwards by one operator: the largest |H v - value v| / |value|.  "MB" is the most memory beyond what the imports
take: network, images, graphs and vectors.

Density: Lanczos runs of `--steps` steps, full reorthogonalisation; PyHessian's own stops on torch 2, so its arithmetic
is not there to compare with; curvlinops' is taken without reorthogonalisation, as it has it.
Deflated trace: `--steps` products.

"between" is the time that is spent outside of the products, in times of these.  A product's cost is given in gradients
(forward and backward to all parameters, the same images at once), without and with the gradient being made one vector,
as a product is.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
import torchvision
from _common import environment, interleave, peak_memory, settle_batchnorm, write_json
from curvlinops import HessianLinearOperator
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis import hessian_eigs, hessian_trace, load, spectral_density
from fpq_analysis.curvature import HessianOperator
from fpq_analysis.curvature.batches import full_precision
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.models import build_model
from fpq_analysis.probes.subject import Subject, prepare
from fpq_analysis.runs.checkpoint import read_checkpoint

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: build_model("resnet20", 10, 3),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
}
Data = tuple[Tensor, Tensor]


def given(args: argparse.Namespace) -> tuple[nn.Module, Data]:
    """The network in eval mode, and its images."""
    torch.manual_seed(0)
    if args.ckpt is not None:
        trained = read_checkpoint(args.ckpt).run
        data = load_dataset(trained["data"], args.data_root or trained["data_root"], image_size=trained["image_size"])
        return load(args.ckpt), training_sample(data, args.images, 0)
    model, images = MODELS[args.model](), torch.randn(args.images, 3, 32, 32)
    settle_batchnorm(model, images)
    return model, (images, torch.randint(10, (args.images,)))


class Clock:
    """Counts products and their seconds, of whatever function makes them."""

    def __init__(self) -> None:
        self.products, self.seconds = 0, 0.0

    def around(self, plain: Callable[..., Any], vectors: Callable[..., int] = lambda *args: 1) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = plain(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.products += vectors(*args)
            return result

        return timed


def ours(task: str, model: nn.Module, data: Data, args: argparse.Namespace, clock: Clock) -> Any:
    HessianOperator.products = clock.around(HessianOperator.products, lambda _, v, *out: len(v))
    if task == "eigenvalues":
        found = hessian_eigs(model, data, args.k, tol=args.tol, eigenvectors=True)
        return np.concatenate([v.reshape(args.k, -1).numpy() for v in found.vectors.values()], 1)
    if task == "density":
        return spectral_density(model, data, n_draws=1, n_steps=args.steps).moment(1)[0]
    found = hessian_trace(model, data, method="deflated", n_products=args.steps)
    return found.value, found.sem


def curvlinops(task: str, model: nn.Module, data: Data, args: argparse.Namespace, clock: Clock) -> Any:
    parameters = list(prepare(model, data).parameters.values()) if args.ckpt else list(model.parameters())
    matrix = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [data], check_deterministic=False)
    if task == "eigenvalues":
        product = clock.around(matrix.to_scipy().matvec)
        operator = LinearOperator(matrix.shape, matvec=product, dtype=np.float32)
        return eigsh(operator, k=args.k, which="LA", tol=args.tol)[1].T
    if task == "density":
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        values, vectors = fast_lanczos(_Timed(matrix, clock), args.steps)
        return matrix.shape[0] * float((values * vectors[0].square()).sum())
    from curvlinops import hutchinson_trace

    return float(hutchinson_trace(_Timed(matrix, clock), num_matvecs=args.steps)), float("nan")


class _Timed:
    """A linear operator of curvlinops with a clock around its products."""

    def __init__(self, matrix: Any, clock: Clock) -> None:
        self.matrix, self.product = matrix, clock.around(matrix.__matmul__, lambda v: v.shape[1] if v.ndim > 1 else 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.matrix, name)

    def __matmul__(self, v: Any) -> Any:
        return self.product(v)


def pyhessian(task: str, model: nn.Module, data: Data, args: argparse.Namespace, clock: Clock) -> Any:
    module = importlib.import_module("pyhessian.hessian")  # the package hides it behind the class of that name
    module.hessian_vector_product = clock.around(module.hessian_vector_product)
    torch.manual_seed(0)
    engine = module.hessian(model, F.cross_entropy, data=data, cuda=False)
    if task == "eigenvalues":
        _, vectors = engine.eigenvalues(maxIter=100, tol=args.tol, top_n=args.k)
        return np.stack([torch.cat([part.flatten() for part in v]).detach().numpy() for v in vectors])
    if task == "density":
        return engine.density(iter=args.steps, n_v=1)
    samples = engine.trace(maxIter=args.steps, tol=-float("inf"))
    return float(np.mean(samples)), float(np.std(samples, ddof=1) / len(samples) ** 0.5)


METHODS = {"ours": ours, "PyHessian": pyhessian, "curvlinops": curvlinops}


def alone(method: str, task: str, args: argparse.Namespace, pipe: Any) -> None:
    """In a process of its own: seconds, products, share between them, memory, and what it found."""
    warnings.filterwarnings("ignore")
    before, clock = psutil.Process().memory_info().rss >> 20, Clock()
    model, data = given(args)
    start = time.perf_counter()
    try:
        found = METHODS[method](task, model, data, args, clock)
    except Exception as error:  # a peer that fails is a result
        pipe.send({"error": f"{type(error).__name__}: {error}".split("\n")[0]})
        return
    spent = time.perf_counter() - start
    row = {
        "seconds": spent,
        "products": clock.products,
        "between": (spent - clock.seconds) / clock.seconds,
        "MB": peak_memory(data[0].device) - before,
    }
    if task == "eigenvalues":
        values, residual = reached(prepare(model, data), found)
        row |= {"found": ", ".join(f"{value:.4g}" for value in values), "residual": residual}
    else:
        row |= {"found": f"{found[0]:.4g} ± {found[1]:.2g}" if task == "trace" else f"first moment {found:.4g}"}
    pipe.send(row)


def reached(subject: Subject, vectors: np.ndarray) -> tuple[list[float], float]:
    """Rayleigh quotients, and the largest relative residual."""
    v = torch.as_tensor(np.ascontiguousarray(vectors), dtype=torch.float32)
    v = v / v.norm(dim=1, keepdim=True)
    with full_precision():
        av = subject.operator().products(v)
    values = (v * av).sum(1)
    residuals = (av - values[:, None] * v).norm(dim=1)
    return sorted(values.tolist(), reverse=True), float((residuals / values.abs()).max())


def product_costs(model: nn.Module, data: Data, rounds: int) -> dict[str, float]:
    """Seconds of a product and of a gradient of all images at once, medians."""
    subject = prepare(model, data)
    operator = subject.operator()
    v = torch.randn(1, operator.size)
    parameters = list(subject.parameters.values())

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(subject.view(data[0]), data[1]), parameters)

    tasks = {
        "gradient": gradient,
        "flat gradient": lambda: torch.cat([g.flatten() for g in gradient()]),
        "product": lambda: operator.products(v),
    }
    for task in tasks.values():
        task()
    return {name: median(times) for name, times in interleave(tasks, rounds, data[0].device).items()}


def trajectory(run: Path, data: Data, k: int, tol: float) -> list[dict[str, Any]]:
    """Every checkpoint after training began, cold and warm."""
    rows: list[dict[str, Any]] = []
    start = None
    for path in sorted(run.glob("epoch_*.pt"))[1:]:
        model = load(path)
        cold = hessian_eigs(model, data, k, tol=tol)
        warm = hessian_eigs(model, data, k, tol=tol, start=start)
        gap = float(np.max(np.abs(cold.values - warm.values) / np.abs(cold.values)))
        rows.append({"epoch": path.stem, "cold": cold.n_products, "warm": warm.n_products, "gap": gap})
        start = warm.start
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="resnet20", help="with random weights (resnet20)")
    parser.add_argument("--ckpt", type=Path, help="checkpoint file, instead of --model")
    parser.add_argument("--data-root", help="folder of the data, if not that of the training run")
    parser.add_argument("--images", type=int, default=128, help="images (128)")
    parser.add_argument("--tasks", nargs="+", default=["eigenvalues"], choices=["eigenvalues", "density", "trace"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--k", type=int, default=2, help="eigenvalues (2)")
    parser.add_argument("--tol", type=float, default=1e-3, help="relative residual (1e-3)")
    parser.add_argument("--steps", type=int, default=80, help="products of density and trace (80)")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing of products (5)")
    parser.add_argument("--trajectory", action="store_true", help="the top 5 of the run's other checkpoints instead")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    where = environment(
        torch.device("cpu"), "torchvision", "fpq-analysis", "pyhessian", "curvlinops-for-pytorch", "scipy"
    )
    console = Console(width=80, highlight=False)
    model, data = given(args)
    size = sum(p.numel() for p in model.parameters())
    console.print(f"{args.ckpt or args.model}: {size:,} parameters, {args.images} images")
    if args.trajectory:
        path = trajectory(args.ckpt.parent, data, 5, args.tol)
        cold, warm = (sum(int(row[kind]) for row in path[1:]) for kind in ("cold", "warm"))
        console.print(f"Top 5 along {len(path)} checkpoints: {cold} products cold, {warm} warm;")
        console.print(f"largest relative difference of an eigenvalue {max(row['gap'] for row in path):.1e}.")
        write_json(args.json, {**where, "options": vars(args), "trajectory": path})
        return
    costs = product_costs(model, data, args.rounds)
    product = costs["product"]
    console.print(
        f"A product takes {product:.3f} s: {product / costs['gradient']:.2f} gradients, "
        f"{product / costs['flat gradient']:.2f} gradients made one vector."
    )
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        table = Table(box=None, title=f"\n{task}", title_justify="left")
        for name in ("method", "s", "ratio", "products", "between", "MB", "residual", "found"):
            table.add_column(name, justify="left" if name in ("method", "found") else "right")
        for method in args.methods:
            # Spawned: threads that were started before a fork do not work after it.
            context = multiprocessing.get_context("spawn")
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=alone, args=(method, task, args, sender))
            process.start()
            sender.close()
            try:
                row = receiver.recv()
            except EOFError:
                row = {"error": "the process died"}
            process.join()
            rows.append({"task": task, "method": method, **row})
            if "error" in row:
                table.add_row(method, *[""] * 6, str(row["error"])[:30])
                continue
            first = next(other for other in rows if other["task"] == task)
            table.add_row(
                method,
                f"{row['seconds']:.1f}",
                f"{row['seconds'] / first.get('seconds', float('nan')):.2f}",
                str(row["products"]),
                f"{row['between']:.2f}",
                f"{row['MB']:,}",
                f"{row['residual']:.0e}" if "residual" in row else "",
                row.get("found", ""),
            )
        console.print(table)
    console.print("", *where.values(), sep="\n")
    write_json(args.json, {**where, "options": vars(args), "costs": costs, "rows": rows})


if __name__ == "__main__":
    main()
