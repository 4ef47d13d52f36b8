"""Which calibration is the better default: Eq. 4-5's min-max, or the mean-squared-error search?

    python benchmarks/calibration.py

On digits and a ResNet-20, for every pair of calibrations (of weights, of inputs) and several bit widths: the relative
squared error of the quantized weights, the test accuracy straight after calibration, and that after a few epochs of
LSQ from there.  Mean and standard deviation over seeds (each with its own float network, calibration images and
shuffles).  About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import pandas as pd
import torch
from _common import environment

from fpq_analysis import TrainConfig, load, train
from fpq_analysis.quantizers.calibration import CALIBRATIONS
from fpq_analysis.quantizers.fake_quantize import fake_quantize


def weight_error(float_checkpoint: Path, bits: int, how: str) -> float:
    """Mean over the inner layers of |Q(w) - w|^2 / |w|^2."""
    weights = [p.detach().flatten(1) for p in load(float_checkpoint).parameters() if p.ndim == 4][1:]
    errors = []
    for w in weights:
        step, zero = CALIBRATIONS[how](w, bits)
        errors.append(
            float((fake_quantize(w, step[:, None], zero[:, None], 2**bits - 1) - w).square().sum() / w.square().sum())
        )
    return sum(errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", default=["W4A4", "W2A4", "W2A2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    where = environment(torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            teacher = Path(folder) / f"fp{seed}"
            train(TrainConfig(epochs=12, lr=0.1, batch_size=128, seed=seed), teacher, log=lambda line: None)
            for bits, weights, inputs in itertools.product(options.bits, CALIBRATIONS, CALIBRATIONS):
                config = TrainConfig(
                    method="lsq", bits=bits, init=str(teacher), epochs=options.epochs, batch_size=128, seed=seed,
                    weight_calibration=weights, act_calibration=inputs,
                )  # fmt: skip
                accuracy = train(config, Path(folder) / f"{seed}{bits}{weights}{inputs}", log=lambda line: None)[
                    "test_accuracy"
                ]
                error = weight_error(teacher / "epoch_0012.pt", int(bits[1]), weights)
                rows.append((bits, weights, inputs, error, 100 * accuracy.iloc[0], 100 * accuracy.iloc[-1]))
    names = ["bits", "weights", "inputs", "weight error", "calibrated %", f"{options.epochs} epochs %"]
    table = pd.DataFrame(rows, columns=names).groupby(names[:3], sort=False).agg(["mean", "std"]).round(2)
    print(table.to_string())
    for name, text in where.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
