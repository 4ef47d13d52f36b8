"""Everything that decides a training run, in one frozen dataclass; its defaults are the paper's protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fpq_analysis.errors import UserError
from fpq_analysis.methods import METHODS, SCHEMES, MethodSettings, load_class
from fpq_analysis.quantspec import QuantSpec
from fpq_analysis.settings import check_settings, documented, setting


@dataclass(frozen=True)
class RunSettings:
    """What every method needs to know; part of `TrainConfig`, where it stands before the methods' own settings."""

    data: str = setting("digits", "digits, cifar10, cifar100 or imagefolder.")
    data_root: str | None = setting(None, "Folder of the data set (not for digits).")
    image_size: int | None = setting(None, "Resize imagefolder images to this side.", within="positive")
    model: str = setting(
        "resnet20", "resnet20, resnet18, resnet50, mobilenet_v1, mobilenet_v2 or package.module:factory."
    )
    method: str = setting("fp", "{choices}.", choices=METHODS)
    bits: str | None = setting(None, "WxAy, for example W4A4 (weights, activations).")
    init: str | None = setting(None, "Folder of the float run to start from, which is also the teacher.")
    epochs: int = setting(200, "Passes over the training data.", within="positive")
    batch_size: int = setting(256, "Images per step.", within="positive")
    lr: float = setting(0.01, "Learning rate at the start of the cosine.", within="positive")
    momentum: float = setting(0.9, "Momentum of SGD.", within="fraction")
    weight_decay: float = setting(5e-4, "Of weights, not of step sizes.", within="non-negative")
    augment: bool = setting(True, "Random crop and flip (the paper most likely had none).")
    quantizer: str | None = setting(
        None, "{choices} in place of the method's own: FPQ on PACT, for example.", choices=SCHEMES
    )


@documented
@dataclass(frozen=True)
class TrainConfig(MethodSettings, RunSettings):
    """One run of training: SGD, the learning rate annealed by a cosine to zero over all steps."""

    weight_calibration: str = setting("mse", "Initial scales of weights: {choices}.", choices=("mse", "minmax"))
    act_calibration: str = setting("mse", "Initial scales of inputs: {choices}.", choices=("mse", "minmax"))
    calibration_images: int = setting(100, "Training images for the first scales.", within="positive")
    accumulate: int = setting(
        1, "Parts of a batch, one after the other, for less memory; BatchNorm sees a part.", within="positive"
    )
    bf16: bool = setting(False, "Networks under bfloat16 autocast; quantizers and losses stay in float32.")
    compile: bool = setting(False, "Compile the network (torch.compile): a minute or more at the start, faster steps.")
    seed: int = setting(0, "Seed of initial weights, shuffles, augmentation and noise.", within="seed")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.accumulate > 1 and self.batch_size < 2 * self.accumulate:
            raise UserError(
                f"A batch of {self.batch_size} in {self.accumulate} parts leaves fewer than 2 images to a part, which "
                "BatchNorm has no statistics of. Choose a smaller --accumulate, or a larger --batch-size."
            )
        method = METHODS[self.method]
        if method.quantized:
            if self.bits is None:
                raise UserError(f"The method '{self.method}' needs a bit width: --bits W4A4, for example.")
            _ = self.spec  # refuses what is no bit width
            if self.init is None:
                raise UserError(
                    f"The method '{self.method}' starts from a trained float network: --init RUN, a folder made by "
                    f"'fpq-analyze train --method fp --model {self.model} --data {self.data}'."
                )
            for regularizer in method.regularizers:
                load_class(regularizer).check(self)
        elif self.bits is not None or self.quantizer is not None:
            raise UserError(
                f"The method '{self.method}' is not quantized; leave --bits and --quantizer out, or use --method lsq."
            )

    @property
    def spec(self) -> QuantSpec | None:
        """The quantization of this run, None for a float one."""
        if self.bits is None:
            return None
        return QuantSpec.parse(
            self.bits,
            weight_calibration=self.weight_calibration,
            act_calibration=self.act_calibration,
            scheme=self.quantizer or METHODS[self.method].quantizer,
        )

    @property
    def name(self) -> str:
        """Default name of the run's folder."""
        method = self.method + (f"-{self.quantizer}" if self.quantizer else "")
        parts = [self.model.replace(":", "."), self.data, method, (self.bits or "").lower(), f"s{self.seed}"]
        return "-".join(part for part in parts if part)


def check_init(init: str | None) -> None:
    """Raise `UserError` if the run to start from is not there."""
    if init is not None and not Path(init).is_dir():
        raise UserError(f"No run '{init}' to start from. Train one first: fpq-analyze train --method fp")
