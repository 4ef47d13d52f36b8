"""Step time of LSQ and FPQ over that of the float network, in the project's own training loop.

    python benchmarks/training.py
    python benchmarks/training.py --model resnet18 --batch-size 128 --device cuda --bf16

What is timed is `_train_epoch`, the loop behind `fpq-analyze train`, on random 32x32 images in memory: shuffling,
augmentation, forward, backward, optimiser step, and for FPQ the teacher, the noise and the distillation loss.  The
methods take turns over several rounds, after a warm-up round, so that the machine's drift touches all alike; a ratio is
taken within each round, and the median over rounds is given with the least and the greatest.

Weights are random, as values do not change the time; the learning rate is small, as random labels must not diverge.
Nothing is extrapolated.  On a CPU the peak memory is that of the process up to the end of the method's warm-up, in the
order fp, lsq, fpq; all three networks and the images are in it from the start.  On CUDA it is the method's own.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import environment, interleave, peak_memory, settle_batchnorm, write_json
from torch import nn

from fpq_analysis.data import Dataset, Split
from fpq_analysis.devices import pick_device
from fpq_analysis.models import build_model
from fpq_analysis.quantizers import calibrate, quantize
from fpq_analysis.training import METHODS, TrainConfig
from fpq_analysis.training.loop import _train_epoch, make_optimizer
from fpq_analysis.training.regularizer import regularizers

CLASSES = 10
LR = 1e-4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", help="resnet20, resnet18, mobilenet_v2 or package:factory")
    parser.add_argument("--batch-size", type=int, default=256, help="images a step (256)")
    parser.add_argument("--steps", type=int, default=6, help="steps a round and method (6)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up (5)")
    parser.add_argument("--bits", default="W4A4", help="of LSQ and FPQ (W4A4)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="networks that are trained by torch.compile")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    if min(args.batch_size, args.steps, args.rounds) < 1:
        parser.error("--batch-size, --steps and --rounds must be above zero")
    return args


def random_data(n: int, device: torch.device) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(0, CLASSES, (n,), generator=generator))
    names = tuple(str(i) for i in range(CLASSES))
    return Dataset("random", split, split, names, mean=(0.5,) * 3, std=(0.3,) * 3, flip=True).to(device)


class Runner:
    """One method, ready to train a round at a time.

    Args:
        teacher: a float network on the device, in eval mode; the trained network starts from it.
    """

    def __init__(self, method: str, teacher: nn.Module, data: Dataset, args: argparse.Namespace) -> None:
        quantized = METHODS[method].quantized
        self.config = TrainConfig(
            model=args.model,
            method=method,
            bits=args.bits if quantized else None,
            init="the teacher in memory" if quantized else None,
            epochs=args.rounds + 1,
            batch_size=args.batch_size,
            lr=LR,
            bf16=args.bf16,
            compile=args.compile,
        )
        self.data = data
        self.teacher = teacher if quantized else None
        self.model = copy.deepcopy(teacher).requires_grad_(True)
        spec = self.config.spec
        if spec is not None:
            self.model = quantize(self.model, spec)
            calibrate(self.model, data.normalize(data.train.images[:100]), spec.act_calibration)
        if args.compile:
            self.model.compile()
        self.method = regularizers(self.config, self.model, self.teacher)
        self.optimizer = make_optimizer(self.config, self.model)
        self.epoch = 0

    def __call__(self) -> dict[str, Any]:
        """Train one round; returns the loop's own row."""
        self.epoch += 1  # FPQ's noise is drawn anew in each
        return _train_epoch(self.config, self.data, self.model, self.teacher, self.method, self.optimizer, self.epoch)


def main() -> None:
    args = parse()
    device = pick_device(args.device)
    where = environment(device, "fpq-analysis")
    data = random_data(args.steps * args.batch_size, device)
    torch.manual_seed(0)
    teacher = build_model(args.model, CLASSES, 3).to(device, memory_format=torch.channels_last)
    settle_batchnorm(teacher, data.normalize(data.train.images[:100]))
    teacher.requires_grad_(False)
    runners = {method: Runner(method, teacher, data, args) for method in METHODS}

    before = peak_memory(device)
    peaks = {}
    for method, runner in runners.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        runner()
        peaks[method] = peak_memory(device)
    times = interleave(runners, args.rounds, device)

    precision = "bfloat16" if args.bf16 else "float32"
    print(f"{args.model}, {args.bits}, batches of {args.batch_size} images of 3x32x32, {device.type}, {precision}")
    print(f"{args.rounds} rounds of {args.steps} steps; medians\n")
    line = "{:<8}{:>9}{:>10}{:>9}{:>16}{:>9}"
    print(line.format("Method", "s/step", "images/s", "over fp", "min .. max", "peak MB"))
    for method, spent in times.items():
        step = median(spent) / args.steps
        ratios = [own / plain for own, plain in zip(spent, times["fp"], strict=True)]
        between = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        numbers = (f"{step:.3f}", f"{args.batch_size / step:.0f}", f"{median(ratios):.2f}", between, peaks[method])
        print(line.format(method, *numbers))
    print(f"\nBefore training: {before} MB.")
    print(*where.values(), sep="\n")
    content = {"options": vars(args), "seconds": times, "peak_mb": peaks, "before_mb": before}
    write_json(args.json, {**where, **content})


if __name__ == "__main__":
    main()
