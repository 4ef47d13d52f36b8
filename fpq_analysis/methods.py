"""The catalogue of training methods: what each is called, looks like, cites, and is made of.

Configuration, training loop, command line, legends, tables and report read it.  A new method is a row here, its own
settings, and one file with its quantizer (`quantizers/`) or its regularizer (`training/`); see `docs/extending.md`.
Classes are named by their place, `module:Class`, so that reading the catalogue loads no torch.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from fpq_analysis.settings import setting

FPQ_PAPER = """@article{pang2025stabilizing,
  title   = {Stabilizing Quantization-Aware Training by Implicit-Regularization on {Hessian} Matrix},
  author  = {Pang, Junbiao and Cai, Tianyang},
  journal = {arXiv preprint arXiv:2503.11159},
  year    = {2025}
}"""
LSQ_PAPER = """@inproceedings{esser2020lsq,
  title     = {Learned Step Size Quantization},
  author    = {Esser, Steven K. and McKinstry, Jeffrey L. and Bablani, Deepika and Appuswamy, Rathinakumar and
               Modha, Dharmendra S.},
  booktitle = {International Conference on Learning Representations},
  year      = {2020}
}"""
LSQ_PLUS_PAPER = """@inproceedings{bhalgat2020lsqplus,
  title     = {{LSQ+}: Improving Low-Bit Quantization through Learnable Offsets and Better Initialization},
  author    = {Bhalgat, Yash and Lee, Jinwon and Nagel, Markus and Blankevoort, Tijmen and Kwak, Nojun},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops},
  year      = {2020}
}"""
PACT_PAPER = """@article{choi2018pact,
  title   = {{PACT}: Parameterized Clipping Activation for Quantized Neural Networks},
  author  = {Choi, Jungwook and Wang, Zhuo and Venkataramani, Swagath and Chuang, Pierce I-Jen and
             Srinivasan, Vijayalakshmi and Gopalakrishnan, Kailash},
  journal = {arXiv preprint arXiv:1805.06085},
  year    = {2018}
}"""
KD_PAPER = """@article{hinton2015distilling,
  title   = {Distilling the Knowledge in a Neural Network},
  author  = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal = {arXiv preprint arXiv:1503.02531},
  year    = {2015}
}"""
SAM_PAPER = """@inproceedings{foret2021sam,
  title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author    = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}"""


@dataclass(frozen=True)
class Scheme:
    """A pair of quantizers.

    Attributes:
        weight: place of a `Quantizer`, called with bits, number of rows and of dimensions.
        activation: place of a `Quantizer`, called with bits.
        of_inputs: what the method learns about its quantized inputs, if it is undefined without them.
    """

    weight: str
    activation: str
    of_inputs: str | None = None


@dataclass(frozen=True)
class Method:
    """One row of the catalogue.

    Attributes:
        label: what legends, tables and the report call it.
        colour: in every figure, None for one of the spare colours.
        sentence: what the report says of it, without a full stop; `{sfp_p}` stands for that setting of the runs.
        bibtex: entry of its paper.
        quantizer: key of `SCHEMES`; None for a float network.
        regularizers: places of `training.regularizer.Regularizer` classes: loss terms, noise, second passes.
        marker: of its points in every figure, as matplotlib names them.
    """

    label: str
    colour: str | None = None
    sentence: str = ""
    bibtex: str = ""
    quantizer: str | None = "lsq"
    regularizers: tuple[str, ...] = ()
    marker: str = "h"

    @property
    def quantized(self) -> bool:
        """Whether the network is quantized, and starts from a float one."""
        return self.quantizer is not None


SCHEMES = {
    "lsq": Scheme("fpq_analysis.quantizers.lsq:LSQ", "fpq_analysis.quantizers.lsq:LSQ"),
    "lsq+": Scheme(
        "fpq_analysis.quantizers.lsq_plus:SymmetricLSQ", "fpq_analysis.quantizers.lsq_plus:LSQPlus", "an offset"
    ),
    "pact": Scheme("fpq_analysis.quantizers.pact:DoReFa", "fpq_analysis.quantizers.pact:PACT", "a clipping level"),
}

# In the order of figures, tables and reports: the float network first, FPQ last.  Most colours are Okabe and Ito's,
# which survive the common forms of colour blindness; the hues are those the FPQ paper names where it names any (FP
# blue, LSQ red, FPQ green).  In grey print the markers tell lines apart.
METHODS = {
    "fp": Method("FP", "#0072B2", quantizer=None, marker="D"),
    "lsq": Method("LSQ", "#D55E00", "LSQ learns the step sizes of weights and inputs", LSQ_PAPER, marker="o"),
    "lsq+": Method(
        "LSQ+",
        "#E69F00",
        "LSQ+ learns step sizes, and offsets of the inputs",
        LSQ_PLUS_PAPER,
        quantizer="lsq+",
        marker="P",
    ),
    "pact": Method(
        "PACT",
        "#56B4E9",
        "PACT learns the clipping level of the inputs (penalty {alpha_decay}) and quantizes weights as DoReFa",
        PACT_PAPER,
        quantizer="pact",
        marker="^",
    ),
    "kd": Method(
        "KD",
        "#CC79A7",
        "KD adds to LSQ a distillation loss of weight {kd_weight} at temperature {kd_temperature}",
        KD_PAPER,
        marker="v",
        regularizers=("fpq_analysis.training.kd:KD",),
    ),
    "sam": Method(
        "SAM",
        "#000000",
        "SAM is LSQ trained by sharpness-aware minimization with radius {sam_rho}",
        SAM_PAPER,
        marker="d",
        regularizers=("fpq_analysis.training.sam:SAM",),
    ),
    "noise-features": Method(
        "noise-features",
        "#5D3A9B",
        sentence="noise-features adds to LSQ uniform noise one step wide at the input of every convolution",
        marker="<",
        regularizers=("fpq_analysis.training.sfp:NoisyFeatures",),
    ),
    "noise-weights": Method(
        "noise-weights",
        "#A6761D",
        sentence="noise-weights adds to LSQ uniform noise one step wide to every convolution's weights",
        marker=">",
        regularizers=("fpq_analysis.training.weight_noise:NoisyWeights",),
    ),
    "fpq": Method(
        "FPQ",
        "#009E73",
        "FPQ adds to LSQ, in training only, uniform noise one quantization step wide at the input of each convolution "
        "with probability {sfp_p}, and distillation of channel-wise standardized features from the float network with "
        "weight {csd_weight}",
        FPQ_PAPER,
        marker="s",
        regularizers=(
            "fpq_analysis.training.sfp:SFP",
            "fpq_analysis.training.csd:CSD",
        ),
    ),
}
BASELINE = "lsq"  # the method that comparisons refer to


@dataclass(frozen=True)
class MethodSettings:
    """The settings that belong to one method or another; part of `training.TrainConfig`."""

    sfp_p: float = setting(0.1, "FPQ: probability of noise at a convolution; 0: off.", within="probability")
    sfp_site: str = setting("after", "FPQ: noise {choices} the input's quantizer.", choices=("after", "before"))
    csd_weight: float = setting(1.0, "FPQ: weight of distillation; 0: off.", within="non-negative")
    csd_reduction: str = setting("mean", "FPQ: mean, or the paper's literal sum.", choices=("mean", "sum"))
    kd_weight: float = setting(1.0, "KD: weight of Hinton's distillation.", within="non-negative")
    kd_temperature: float = setting(1.0, "KD: both networks' logits are divided by it.", within="positive")
    sam_rho: float = setting(0.05, "SAM: length of the ascent step.", within="non-negative")
    alpha_decay: float = setting(5e-4, "PACT: weight of the term on clipping levels.", within="non-negative")


def load_class(place: str) -> Any:
    """The class at `module:Class`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def method_label(method: str, bits: str = "FP") -> str:
    """What a reader calls a method, at so many bits; one that is not in the catalogue has the name it came with."""
    name = METHODS[method].label if method in METHODS else method
    return name if bits == "FP" else f"{name} {bits}"


def method_rank(method: str) -> int:
    """Where a method stands among others; those that are not in the catalogue come before its last row."""
    names = list(METHODS)
    return 2 * names.index(method) if method in METHODS else 2 * len(names) - 3


def bits_rank(bits: str) -> tuple[int, ...]:
    """To sort bit widths by: `FP`, then more bits before fewer, those of the weights first (W4A4, W2A4, W2A2)."""
    return tuple(-int(number) for number in re.findall(r"\d+", bits))
