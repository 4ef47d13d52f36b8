"""Products and seconds to the ten largest eigenvalues: this package, PyHessian, and curvlinops with SciPy's eigsh.

    python benchmarks/eigs.py --ckpt RUN/epoch_0020.pt                # one checkpoint, all three
    python benchmarks/eigs.py --ckpt RUN/epoch_0020.pt --trajectory   # and its run's 20 checkpoints, cold and warm

One network, one set of images, float32, the same parameters.  Ours and eigsh stop at a relative residual of 1e-3.
PyHessian has no residual: it stops when an eigenvalue changes by less than 1e-3 between two iterations, or after 100.
What each has reached is measured afterwards with one operator: the largest |H v - value v| / |value|.  PyHessian's
eigenvalues are those of largest magnitude; where negative ones are among them, all three are asked for these.

The cost of a product is given in gradients (forward and backward to all parameters on the same images), when vectors
share the graph of the gradient: kept for one micro-batch, and in blocks of eight columns over micro-batches.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import torch
from _common import environment, interleave, write_json
from curvlinops import HessianLinearOperator
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.nn import functional as F

from fpq_analysis import hessian_eigs, load
from fpq_analysis.checkpoint import read_checkpoint
from fpq_analysis.curvature.batches import full_precision
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.devices import pick_device
from fpq_analysis.probes.subject import Subject, prepare

Row = dict[str, float | str]
COLUMNS = 8


def ours(subject: Subject, data: tuple[Tensor, Tensor], k: int, tol: float) -> tuple[Row, np.ndarray]:
    start = time.perf_counter()
    found = hessian_eigs(subject.view, data, k, tol=tol, micro_batch=len(subject.data[0][0]), eigenvectors=True)
    spent = time.perf_counter() - start
    assert found.vectors is not None
    row: Row = {"method": "ours", "products": found.n_products, "seconds": spent}
    return row, np.concatenate([v.reshape(k, -1) for v in found.vectors.values()], 1)


def scipys(subject: Subject, k: int, tol: float) -> tuple[Row, np.ndarray]:
    start = time.perf_counter()
    theirs = HessianLinearOperator(
        subject.view, torch.nn.CrossEntropyLoss(), list(subject.parameters.values()), subject.data
    ).to_scipy()
    products = 0

    def count(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return theirs @ v

    _, vectors = eigsh(LinearOperator(theirs.shape, matvec=count, dtype=np.float32), k=k, which="LA", tol=tol)
    spent = time.perf_counter() - start
    return {"method": "curvlinops, eigsh", "products": products, "seconds": spent}, vectors.T


def pyhessians(subject: Subject, k: int, tol: float) -> tuple[Row, np.ndarray]:
    module = importlib.import_module("pyhessian.hessian")  # the package hides it behind the class of that name

    plain, products = module.hessian_vector_product, 0

    def count(*args: object) -> object:
        nonlocal products
        products += 1
        return plain(*args)

    module.hessian_vector_product = count
    try:
        torch.manual_seed(0)
        whole = tuple(torch.cat(column) for column in zip(*subject.data, strict=True))
        start = time.perf_counter()
        engine = module.hessian(subject.view, F.cross_entropy, data=whole, cuda=whole[0].is_cuda)
        _, vectors = engine.eigenvalues(maxIter=100, tol=tol, top_n=k)
        spent = time.perf_counter() - start
    finally:
        module.hessian_vector_product = plain
    flat = np.stack([torch.cat([part.flatten() for part in v]).detach().cpu().numpy() for v in vectors])
    return {"method": "PyHessian", "products": products, "seconds": spent}, flat


def reached(subject: Subject, vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """Rayleigh quotients, and the largest relative residual."""
    v = torch.as_tensor(vectors.T, dtype=torch.float32, device=subject.data[0][0].device)
    v = v / v.norm(dim=0)
    av = subject.operator().matmat(v)
    values = (v * av).sum(0)
    return values.cpu().numpy(), float(((av - v * values).norm(dim=0) / values.abs()).max())


def product_costs(subject: Subject, rounds: int) -> dict[str, float]:
    """One product in gradients: kept graph of one micro-batch; a block of columns over all micro-batches."""
    x, y = (torch.cat(column) for column in zip(*subject.data, strict=True))
    small = Subject(subject.view, [(x[:32], y[:32])], subject.loss, True, subject.parameters)
    kept, blocks = small.operator(), subject.operator()
    v = torch.randn(kept.size, COLUMNS, device=x.device)

    def gradient(batches: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in batches:
            torch.autograd.grad(F.cross_entropy(subject.view(x), y), list(subject.parameters.values()))

    tasks = {
        "gradient 32": lambda: gradient(small.data),
        "kept": lambda: kept.matmat(v),
        "gradient": lambda: gradient(subject.data),
        "blocks": lambda: blocks.matmat(v),
        "single": lambda: blocks.matmat(v[:, :1]),
    }
    for task in tasks.values():
        task()
    seconds = {name: median(times) for name, times in interleave(tasks, rounds, x.device).items()}
    return {
        "one micro-batch of 32, graph kept": seconds["kept"] / COLUMNS / seconds["gradient 32"],
        f"blocks of {COLUMNS} columns": seconds["blocks"] / COLUMNS / seconds["gradient"],
        "one column at a time": seconds["single"] / seconds["gradient"],
    }


def trajectory(run: Path, data: tuple[Tensor, Tensor], k: int, tol: float) -> list[Row]:
    """Every checkpoint after training began, cold and warm."""
    rows: list[Row] = []
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
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint file")
    parser.add_argument("--data-root", help="folder of the data, if not that of the training run")
    parser.add_argument("--n-data", type=int, default=128, help="images (128)")
    parser.add_argument("--k", type=int, default=10, help="eigenvalues (10)")
    parser.add_argument("--tol", type=float, default=1e-3, help="relative residual (1e-3)")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing of products (3)")
    parser.add_argument("--trajectory", action="store_true", help="also the top 5 of the run's other checkpoints")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = pick_device(args.device)
    where = environment(device, "fpq-analysis", "pyhessian", "curvlinops-for-pytorch", "scipy")
    trained = read_checkpoint(args.ckpt).run
    data = load_dataset(trained["data"], args.data_root or trained["data_root"], image_size=trained["image_size"])
    images = training_sample(data.to(device), args.n_data, 0)
    subject = prepare(load(args.ckpt), images, device=device)
    console = Console(width=80, highlight=False)

    costs = product_costs(subject, args.rounds)
    console.print("A product with the Hessian, in gradients:")
    for name, cost in costs.items():
        console.print(f"  {name}: {cost:.2f}")

    table = Table(box=None, title=f"\nThe {args.k} largest eigenvalues, {args.n_data} images", title_justify="left")
    for name in ("method", "products", "seconds", "largest residual", "first, last"):
        table.add_column(name, justify="left" if name == "method" else "right")
    rows: list[Row] = []
    with full_precision():
        for row, vectors in (
            ours(subject, images, args.k, args.tol),
            scipys(subject, args.k, args.tol),
            pyhessians(subject, args.k, args.tol),
        ):
            values, residual = reached(subject, vectors)
            rows.append({**row, "residual": residual, "values": str(np.sort(values)[::-1].round(3).tolist())})
            ends = f"{values.max():.4g}, {values.min():.4g}"
            table.add_row(str(row["method"]), str(row["products"]), f"{row['seconds']:.1f}", f"{residual:.1e}", ends)
    console.print(table)
    path: list[Row] = []
    if args.trajectory:
        path = trajectory(args.ckpt.parent, images, 5, args.tol)
        cold, warm = (sum(int(row[kind]) for row in path[1:]) for kind in ("cold", "warm"))
        saved = 100 * (1 - warm / cold)
        worst = max(float(row["gap"]) for row in path)
        console.print(f"\nTop 5 along {len(path)} checkpoints: {cold} products cold, {warm} warm: {saved:.0f} % saved;")
        console.print(f"largest relative difference of an eigenvalue {worst:.1e}.")
    console.print("", *where.values(), sep="\n")
    write_json(args.json, {**where, "options": vars(args), "costs": costs, "rows": rows, "trajectory": path})


if __name__ == "__main__":
    main()
