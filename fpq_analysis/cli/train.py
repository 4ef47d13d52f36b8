"""`fpq-analyze train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpq_analysis.cli.app import DataRoot, Device, Json, app, guarded, print_json, say


@app.command()
@guarded
def train(
    method: Annotated[
        str, typer.Option(help="fp, lsq, lsq+, pact, kd, sam, fpq, noise-features or noise-weights.")
    ] = "fp",
    model: Annotated[
        str, typer.Option(help="resnet20, resnet18, mobilenet_v2 or package.module:factory.")
    ] = "resnet20",
    data: Annotated[str, typer.Option(help="digits, cifar10, cifar100 or imagefolder.")] = "digits",
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option(help="Fetch CIFAR into --data-root.")] = False,
    image_size: Annotated[int | None, typer.Option(help="Resize imagefolder images to this side.")] = None,
    bits: Annotated[str | None, typer.Option(help="WxAy, for example W4A4 (weights, activations).")] = None,
    init: Annotated[str | None, typer.Option(help="Float run that is start and teacher.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: a new one in checkpoints/.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 256,
    lr: Annotated[float, typer.Option(help="Learning rate at the start of the cosine.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Of weights, not of step sizes.")] = 5e-4,
    augment: Annotated[bool, typer.Option(help="Random crop and flip (the paper most likely had none).")] = True,
    quantizer: Annotated[
        str | None, typer.Option(help="lsq, lsq+ or pact in place of the method's own: FPQ on PACT, for example.")
    ] = None,
    sfp_p: Annotated[float, typer.Option(help="FPQ: probability of noise at a convolution; 0: off.")] = 0.1,
    sfp_site: Annotated[str, typer.Option(help="FPQ: noise after or before the input's quantizer.")] = "after",
    csd_weight: Annotated[float, typer.Option(help="FPQ: weight of distillation; 0: off.")] = 1.0,
    csd_reduction: Annotated[str, typer.Option(help="FPQ: mean, or the paper's literal sum.")] = "mean",
    kd_weight: Annotated[float, typer.Option(help="KD: weight of Hinton's distillation.")] = 1.0,
    kd_temperature: Annotated[float, typer.Option(help="KD: both networks' logits are divided by it.")] = 1.0,
    sam_rho: Annotated[float, typer.Option(help="SAM: how far it climbs.")] = 0.05,
    alpha_decay: Annotated[float, typer.Option(help="PACT: weight of the term on clipping levels.")] = 5e-4,
    weight_calibration: Annotated[str, typer.Option(help="First scales of weights: mse or minmax.")] = "mse",
    act_calibration: Annotated[str, typer.Option(help="First scales of inputs: mse or minmax.")] = "mse",
    calibration_images: Annotated[int, typer.Option(help="Training images for the first scales.")] = 100,
    bf16: Annotated[bool, typer.Option("--bf16", help="Networks under bfloat16 autocast.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, shuffles, augmentation and noise.")] = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw an existing run away.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
    json: Json = False,
) -> None:
    """Train one network, with a checkpoint before training and after every epoch.

    [bold]Examples[/bold]

      fpq-analyze train --epochs 15 --lr 0.1 --out checkpoints/fp

      fpq-analyze train --method fpq --bits W4A4 --init checkpoints/fp --epochs 15
    """
    options = {k: v for k, v in locals().items() if k not in _NOT_CONFIG}
    from fpq_analysis.training import TrainConfig
    from fpq_analysis.training import train as run_training

    config = TrainConfig(**options)
    run = out or Path("checkpoints") / config.name
    if dry_run:
        say(f"Would train {run}:")
        for key, value in options.items():
            say(f"  {key} = {value}")
        return
    frame = run_training(config, run, device=device, download=download, resume=resume, overwrite=overwrite, log=say)
    if json:
        print_json(frame)
    last = frame.iloc[-1]
    say(f"Done: {run}, epoch {int(last['epoch'])}, test accuracy {100 * last['test_accuracy']:.2f} %")


_NOT_CONFIG = ("download", "out", "device", "resume", "overwrite", "dry_run", "json")
