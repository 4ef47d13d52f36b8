"""The trace of a whole data set from as few of its images as an error of 2 % needs: does its interval hold?

    python benchmarks/population.py --ckpt RUN/epoch_0020.pt --n-data 10000 --seeds 50

The exact trace over all images is the truth.  Then `hessian_trace(..., tol=0.02)` for many seeds: how often its 95 %
interval for these images holds the truth, how many images and labels it drew, and its seconds in gradient passes over
the images it drew.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from statistics import mean, median

import torch
from _common import environment, write_json
from torch.nn import functional as F

from fpq_analysis import hessian_trace, load
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.devices import pick_device
from fpq_analysis.intervals import half_interval
from fpq_analysis.probes.subject import prepare
from fpq_analysis.runs.checkpoint import read_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint file")
    parser.add_argument("--data-root", help="folder of the data, if not that of the training run")
    parser.add_argument("--n-data", type=int, default=10_000, help="images in all (10,000)")
    parser.add_argument("--tol", type=float, default=0.02, help="relative standard error (0.02)")
    parser.add_argument("--seeds", type=int, default=50, help="runs (50)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = pick_device(args.device)
    where = environment(device, "fpq-analysis")
    trained = read_checkpoint(args.ckpt).run
    data = load_dataset(trained["data"], args.data_root or trained["data_root"], image_size=trained["image_size"])
    images = training_sample(data.to(device), args.n_data, 0)
    model = load(args.ckpt).to(device, memory_format=torch.channels_last)

    start = time.perf_counter()
    truth = hessian_trace(model, images, method="exact")
    spent = time.perf_counter() - start
    spread = truth.sem_data * args.n_data**0.5 / truth.value
    print(f"exact: {truth.value:.4g} over {args.n_data} images, {spent:.0f} s; spread over images {spread:.2f} of it")

    subject = prepare(model, (images[0][:1024], images[1][:1024]), device=device)
    parameters = list(subject.parameters.values())

    def gradient() -> float:
        start = time.perf_counter()
        for x, y in subject.data:
            torch.autograd.grad(F.cross_entropy(subject.view(x), y), parameters)
        return (time.perf_counter() - start) / 1024

    gradient()
    rows = []
    for seed in range(args.seeds):
        one = gradient()
        start = time.perf_counter()
        found = hessian_trace(model, images, tol=args.tol, seed=seed)
        spent = time.perf_counter() - start
        holds = abs(found.value - truth.value) <= half_interval(found.sem, found.dof)
        passes = spent / (one * found.n_data)
        rows.append(
            {"seed": seed, "value": found.value, "sem": found.sem, "n": found.n_data, "passes": passes, "holds": holds}
        )
        print(
            f"seed {seed}: {found.value:.4g} ± {found.sem:.2g}, {found.n_data} images, {found.n_products} labels each, "
            f"{spent:.1f} s = {passes:.2f} gradient passes over them{'' if holds else '  MISSED'}",
            flush=True,
        )
    held = sum(row["holds"] for row in rows)
    print(f"\nheld in {held} of {len(rows)}; {mean(row['n'] for row in rows):.0f} images drawn on average;")
    print(f"{median(row['passes'] for row in rows):.2f} gradient passes (median)")
    print(*where.values(), sep="\n")
    write_json(args.json, {**where, "options": vars(args), "truth": truth.value, "rows": rows})


if __name__ == "__main__":
    main()
