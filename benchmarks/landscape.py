"""A landscape beside as many plain forward passes over the same batches: how much does moving the weights cost?

    python benchmarks/landscape.py --images 512 --points 25 --rounds 3

A ResNet at W4A4 with random weights and settled BatchNorm, random images.  The landscape is the whole call: copying the
network, drawing the directions, every point, every error.  A plain pass is the network's own forward pass over the same
micro-batches, as plain weights, without keeping anything.  For `records`, the points are also written to disk, as the
command does.  Ratios are taken within a round, and the median is reported.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from _common import environment, interleave, settle_batchnorm, write_json

from fpq_analysis import QuantSpec, calibrate, quantize, records
from fpq_analysis.curvature.batches import full_precision
from fpq_analysis.devices import pick_device
from fpq_analysis.models import build_model
from fpq_analysis.pipeline.store import FLUSH
from fpq_analysis.probes.landscape import LandscapeSettings
from fpq_analysis.probes.landscape.grid import DEVICE_BATCH, LossGrid
from fpq_analysis.probes.subject import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", help="name of the network (resnet20)")
    parser.add_argument("--images", type=int, default=512, help="images of 3 x 32 x 32 (512)")
    parser.add_argument("--points", type=int, default=25, help="grid points along each axis (25)")
    parser.add_argument("--weights", default="dequantized,requantized", help="kinds (dequantized,requantized)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (3)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    device = pick_device(args.device)
    where = environment(device, "fpq-analysis")
    torch.manual_seed(0)
    x, y = torch.randn(args.images, 3, 32, 32), torch.randint(10, (args.images,))
    model = build_model(args.model, 10, 3)
    settle_batchnorm(model, x[:128])
    model = quantize(model, QuantSpec.parse("W4A4"))
    calibrate(model, x[:100], "minmax")
    model = model.eval().to(device, memory_format=torch.channels_last)
    data = (x.to(device), y.to(device))
    micro_batch = DEVICE_BATCH if device.type == "cuda" else None
    subject = prepare(model, data, micro_batch=micro_batch)
    n_points = args.points**2

    @torch.no_grad()
    def plain() -> None:
        with full_precision():
            for _ in range(n_points):
                for inputs, _ in subject.data:
                    subject.view(inputs)

    def drawn(weights: str, folder: Path | None = None) -> None:
        settings = LandscapeSettings(weights=weights, points=args.points)
        grid = LossGrid(model, data, settings)
        waiting = [*grid.notes]
        written = time.monotonic()
        for piece in settings.pieces(0):
            waiting += grid.measure(piece)
            if folder is not None and time.monotonic() - written > FLUSH:
                records.append(folder, "landscape", waiting)
                waiting, written = [], time.monotonic()
        if folder is not None:
            records.append(folder, "landscape", waiting)

    with tempfile.TemporaryDirectory() as name:
        tasks: dict[str, Callable[[], object]] = {f"plain: {n_points} forward passes": plain}
        for weights in args.weights.split(","):
            tasks[weights] = lambda weights=weights: drawn(weights)
        tasks["dequantized, records"] = lambda: drawn("dequantized", Path(name))
        with torch.no_grad():
            for inputs, _ in subject.data:  # warm up
                subject.view(inputs)
        found = interleave(tasks, args.rounds, device)
    base, *others = found
    print(f"{args.model} W4A4, {args.images} images, {args.points} x {args.points} points, {args.rounds} rounds")
    print(f"{base:32} {median(found[base]):8.2f} s")
    ratios = {}
    for task in others:
        ratios[task] = [one / passes for one, passes in zip(found[task], found[base], strict=True)]
        spread = f"({min(ratios[task]):.3f} to {max(ratios[task]):.3f})"
        print(f"{task:32} {median(found[task]):8.2f} s   ratio {median(ratios[task]):.3f} {spread}")
    print(*where.values(), sep="\n")
    write_json(args.json, {**where, "options": vars(args), "seconds": found, "ratios": ratios})


if __name__ == "__main__":
    main()
