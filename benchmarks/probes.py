"""Seconds that every probe, or some, takes on one checkpoint, at its default settings.

    python benchmarks/probes.py --ckpt RUN/epoch_0004.pt --n-data 512

The checkpoint must be of a quantized run with a teacher and an epoch before it, so that every probe applies.  Each is
called once, as `measure` calls it, after a gradient over the same images to warm up; the time of that gradient stands
beside, as what all are made of.  Loading the checkpoint and writing the records are not in it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from _common import environment, write_json
from torch.nn import functional as F

from fpq_analysis import load
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.devices import pick_device
from fpq_analysis.probes import PROBES, Point
from fpq_analysis.probes.subject import prepare
from fpq_analysis.runs import Run
from fpq_analysis.runs.checkpoint import read_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint file of a quantized run, not its first")
    parser.add_argument("--data-root", help="folder of the data, if not that of the training run")
    parser.add_argument("--n-data", type=int, default=512, help="images (512)")
    parser.add_argument("--probes", nargs="+", choices=list(PROBES), default=list(PROBES), help="all, unless named")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = pick_device(args.device)
    where = environment(device, "fpq-analysis")
    trained = read_checkpoint(args.ckpt).run
    data = load_dataset(trained["data"], args.data_root or trained["data_root"], image_size=trained["image_size"])
    images = training_sample(data.to(device), args.n_data, 0)
    run = args.ckpt.parent
    before = [path for path in Run(run).checkpoints.values() if path.name < args.ckpt.name]
    teacher = Run(run).teacher
    if teacher is None or not before:
        parser.error(f"{args.ckpt} has no teacher, or no checkpoint before it")
    model, previous, float_model = (
        load(path).to(device, memory_format=torch.channels_last) for path in (args.ckpt, before[-1], teacher)
    )

    subject = prepare(model, images)

    def gradient() -> float:
        start = time.perf_counter()
        for x, y in subject.data:
            torch.autograd.grad(F.cross_entropy(subject.view(x), y), list(subject.parameters.values()))
        return time.perf_counter() - start

    gradient()
    one = gradient()
    print(f"one gradient over {args.n_data} images: {one:.2f} s\n\n{'probe':<18}{'seconds':>9}{'gradients':>11}")
    seconds = {}
    for name in args.probes:
        start = time.perf_counter()
        PROBES[name]()(Point(model, images, teacher=float_model, previous=previous))
        seconds[name] = time.perf_counter() - start
        print(f"{name:<18}{seconds[name]:>9.1f}{seconds[name] / one:>11.1f}", flush=True)
    print(f"{'all':<18}{sum(seconds.values()):>9.1f}{sum(seconds.values()) / one:>11.1f}\n")
    print(*where.values(), sep="\n")
    write_json(args.json, {**where, "options": vars(args), "gradient": one, "seconds": seconds})


if __name__ == "__main__":
    main()
