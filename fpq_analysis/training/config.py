"""Everything that decides a training run, in one frozen dataclass; its defaults are the paper's protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.quantizers import QuantSpec
from fpq_analysis.quantizers.calibration import CALIBRATIONS
from fpq_analysis.training.csd import REDUCTIONS


@dataclass(frozen=True)
class Method:
    """What a training method is made of."""

    quantized: bool
    sfp: bool = False
    csd: bool = False


METHODS = {
    "fp": Method(quantized=False),
    "lsq": Method(quantized=True),
    "fpq": Method(quantized=True, sfp=True, csd=True),
}


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
        data, data_root, image_size: see `data.load_dataset`.
        model: see `models.build_model`.
        method: key of `METHODS`.
        bits: `WxAy`; None for a float run.
        init: folder of the float run whose last checkpoint is start and teacher; None for a float run.
        epochs, batch_size, lr, momentum, weight_decay: SGD with cosine annealing of the rate to zero over all steps.
        augment: random crop, and mirror flip where the data set allows one.
        sfp_p: probability of noise at each convolution and step (FPQ Eq. 14).
        csd_weight, csd_reduction: weight of the distillation loss beside the cross-entropy, and `mean` or `sum`.
        weight_calibration, act_calibration, calibration_images: how step sizes and zero points get first values.
        bf16: run the networks under bfloat16 autocast; quantizers and losses stay in float32.
        seed: of the initial weights, the shuffles, the augmentation and the noise.
    """

    data: str = "digits"
    data_root: str | None = None
    image_size: int | None = None
    model: str = "resnet20"
    method: str = "fp"
    bits: str | None = None
    init: str | None = None
    epochs: int = 200
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    sfp_p: float = 0.1
    csd_weight: float = 1.0
    csd_reduction: str = "mean"
    weight_calibration: str = "mse"
    act_calibration: str = "mse"
    calibration_images: int = 100
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("weight_calibration", self.weight_calibration, CALIBRATIONS)
        _one_of("act_calibration", self.act_calibration, CALIBRATIONS)
        _one_of("csd_reduction", self.csd_reduction, REDUCTIONS)
        for name in ("epochs", "batch_size", "lr", "calibration_images"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}, and must be above zero.")
        for name in ("momentum", "weight_decay", "csd_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, and must not be negative.")
        if not 0 <= self.sfp_p <= 1:
            raise UserError(f"sfp_p is {self.sfp_p}, and must be a probability, from 0 to 1.")
        if METHODS[self.method].quantized:
            if self.bits is None:
                raise UserError(f"The method '{self.method}' needs a bit width: --bits W4A4, for example.")
            if self.init is None:
                raise UserError(
                    f"The method '{self.method}' starts from a trained float network: --init RUN, a folder made by "
                    f"'fpq-analyze train --method fp --model {self.model} --data {self.data}'."
                )
            QuantSpec.parse(self.bits)
        elif self.bits is not None:
            raise UserError(f"The method '{self.method}' is not quantized; leave --bits out, or use --method lsq.")

    @property
    def spec(self) -> QuantSpec | None:
        """The quantization of this run, None for a float one."""
        if self.bits is None:
            return None
        return QuantSpec.parse(
            self.bits, weight_calibration=self.weight_calibration, act_calibration=self.act_calibration
        )

    @property
    def name(self) -> str:
        """Default name of the run's folder."""
        parts = [self.model.replace(":", "."), self.data, self.method, (self.bits or "").lower(), f"s{self.seed}"]
        return "-".join(part for part in parts if part)


def _one_of(what: str, value: Any, known: Any) -> None:
    if value not in known:
        raise UserError(f"Unknown {what} '{value}'{did_you_mean(value, known)}. Known: {', '.join(known)}.")
