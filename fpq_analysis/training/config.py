"""Everything that decides a training run, in one frozen dataclass; its defaults are the paper's protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.quantizers import SCHEMES, QuantSpec
from fpq_analysis.quantizers.calibration import CALIBRATIONS
from fpq_analysis.quantizers.noise import SITES
from fpq_analysis.quantizers.spec import FLOAT_BITS
from fpq_analysis.training.csd import REDUCTIONS


@dataclass(frozen=True)
class Method:
    """What a training method is made of.

    Attributes:
        quantizer: key of `quantizers.SCHEMES`, None for a float network.
        sfp, csd: FPQ's noise and distillation.
        kd, sam: Hinton's distillation; sharpness-aware minimization.
        noise: `features` or `weights`: noise in every convolution and step, for Figure 2.
    """

    quantizer: str | None = "lsq"
    sfp: bool = False
    csd: bool = False
    kd: bool = False
    sam: bool = False
    noise: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether the network is quantized, and starts from a float one."""
        return self.quantizer is not None


METHODS = {
    "fp": Method(quantizer=None),
    "lsq": Method(),
    "lsq+": Method(quantizer="lsq+"),
    "pact": Method(quantizer="pact"),
    "kd": Method(kd=True),
    "sam": Method(sam=True),
    "fpq": Method(sfp=True, csd=True),
    "noise-features": Method(noise="features"),
    "noise-weights": Method(noise="weights"),
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
        quantizer: key of `quantizers.SCHEMES` in place of the method's own: FPQ, KD and SAM work on any.
        sfp_p, sfp_site: probability of noise at each convolution and step (FPQ Eq. 14), 0 for CSD alone; `after` or
            `before` the quantizer.
        csd_weight, csd_reduction: weight of the distillation loss beside the cross-entropy, 0 for SFP alone; `mean` or
            `sum`.
        kd_weight, kd_temperature: of Hinton's distillation.
        sam_rho: how far SAM climbs.
        alpha_decay: weight of PACT's term, half the sum of squared clipping levels.
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
    quantizer: str | None = None
    sfp_p: float = 0.1
    sfp_site: str = "after"
    csd_weight: float = 1.0
    csd_reduction: str = "mean"
    kd_weight: float = 1.0
    kd_temperature: float = 1.0
    sam_rho: float = 0.05
    alpha_decay: float = 5e-4
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
        _one_of("sfp_site", self.sfp_site, SITES)
        if self.quantizer is not None:
            _one_of("quantizer", self.quantizer, SCHEMES)
        for name in ("epochs", "batch_size", "lr", "calibration_images", "kd_temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}, and must be above zero.")
        for name in ("momentum", "weight_decay", "csd_weight", "kd_weight", "sam_rho", "alpha_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, and must not be negative.")
        if not 0 <= self.sfp_p <= 1:
            raise UserError(f"sfp_p is {self.sfp_p}, and must be a probability, from 0 to 1.")
        if METHODS[self.method].quantized:
            if self.bits is None:
                raise UserError(f"The method '{self.method}' needs a bit width: --bits W4A4, for example.")
            QuantSpec.parse(self.bits)
            if self.init is None:
                raise UserError(
                    f"The method '{self.method}' starts from a trained float network: --init RUN, a folder made by "
                    f"'fpq-analyze train --method fp --model {self.model} --data {self.data}'."
                )
            self._check_noise()
        elif self.bits is not None or self.quantizer is not None:
            raise UserError(
                f"The method '{self.method}' is not quantized; leave --bits and --quantizer out, or use --method lsq."
            )

    def _check_noise(self) -> None:
        spec, noise = self.spec, METHODS[self.method].noise
        assert spec is not None  # it is a quantized method
        for where, bits in (("features", spec.act_bits), ("weights", spec.weight_bits)):
            if noise == where and bits == FLOAT_BITS:
                raise UserError(
                    f"'{self.method}' adds noise of half a quantization step to the {where}, which {self.bits} leaves "
                    "in floating point, without steps. Quantize both, as in W4A4."
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


def _one_of(what: str, value: Any, known: Any) -> None:
    if value not in known:
        raise UserError(f"Unknown {what} '{value}'{did_you_mean(value, known)}. Known: {', '.join(known)}.")
