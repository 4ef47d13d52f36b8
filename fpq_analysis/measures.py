"""The catalogue of measurements: what each is called, what it can be told, what is drawn of it and said about it.

Probes, command line, figures and report read it.  A new measurement is a row here with its settings, a file in
`probes/`, and if it has a figure one in `plots/`; see `docs/extending.md`.  Functions and classes are named by their
place, `module:name`, so that reading the catalogue loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fpq_analysis.choices import check_definition
from fpq_analysis.errors import UserError
from fpq_analysis.settings import documented, setting


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        key: what `fpq-analyze figures` calls it; the paper's are numbers.
        title: what a reader calls it.
        draw: place in `plots/` of the function from records to a `Figure`; it raises `NothingToDraw` if there is
            nothing to draw.
        caption: place of the function from the same records to what a reader must know beside it.
        last: whether only the last epoch of each run is drawn, so that the others need not be measured for it.
        single: whether it shows a single network as well, outside of any run: then results draw it.
    """

    key: str
    title: str
    draw: str
    caption: str
    last: bool = False
    single: bool = False

    @property
    def file(self) -> str:
        """Name of its files, without suffix."""
        return f"figure{self.key}" if self.key.isdigit() else self.key


@dataclass(frozen=True)
class NoSettings:
    """Of a measurement that needs none."""


@dataclass(frozen=True)
class Measure:
    """One row of the catalogue.

    Attributes:
        title: heading of its table in the report.
        subject: what it measures, after "We measured".
        page: of the documentation, in `docs/`.
        command: of `fpq-analyze`, that measures it.
        probe: place in `probes/` of its class, whose defaults `fpq-analyze figures` measures; None: nothing
            by default.
        help: what `--help` says of its command; none if the command is written by hand, in `cli/`.
        settings: the fields of the probe's class, which are the command's own options.
        shared: other defaults of options that all measuring commands have.
        fixed: values of such options that its command does not offer.
        headings: quantities that the command prints, each with its heading; none for all the records have.
        note: what the command says below them.
        show: function of `cli/shown.py` that prints its records otherwise.
        pictures: its figures.
        quantized: whether only quantized networks have it.
    """

    title: str
    subject: str
    page: str
    command: str
    probe: str | None
    help: str = ""
    settings: type = NoSettings
    shared: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    headings: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    show: str | None = None
    pictures: tuple[Picture, ...] = ()
    quantized: bool = False


@documented
@dataclass(frozen=True)
class VarianceSettings:
    """Of `output_variance`."""

    sds: tuple[float, ...] = setting((0.05, 0.1, 0.2, 0.5), "Standard deviations of the noise; may be repeated.")
    n_draws: int = setting(8, "Draws of the noise per sample.")

    def __post_init__(self) -> None:
        if not self.sds or not all(0 < sd < math.inf for sd in self.sds):
            raise UserError(f"The noise's standard deviations are {list(self.sds)}; give one or more above zero.")
        if self.n_draws < 3:
            raise UserError(f"n_draws is {self.n_draws}; a variance with its error needs at least 3 draws an image.")


@documented
@dataclass(frozen=True)
class GradNormSettings:
    """Of `gradient_norms`; the batch size is that of the paper's training."""

    definition: str = setting("dequantized", "dequantized, latent or float.")
    n_draws: int = setting(8, "Draws of noise in the weights; a quarter as many in features.")
    batch_size: int = setting(256, "Samples in a minibatch.")

    def __post_init__(self) -> None:
        check_definition(self.definition)
        if self.n_draws < 2:
            raise UserError(f"n_draws is {self.n_draws}; an error needs at least 2 draws of the noise.")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; a minibatch has at least one sample.")


@documented
@dataclass(frozen=True)
class FeatureSettings:
    """Of `feature_statistics`."""

    layer: str = setting("auto", "NAME, NAME:input, or auto: an activation in the middle.")


@documented
@dataclass(frozen=True)
class NoiseSettings:
    """Of `noise_response`.

    Most of the increase is that of a few samples.  From two draws of each (ResNet-20 on digits, 512 images) the error
    of the whole came out between half of what it was and twice as much; from eight, within a factor of one and a half.
    """

    sizes: tuple[float, ...] = setting(
        (0.125, 0.25, 0.5, 1.0, 2.0, 4.0), "Widths of the noise in steps, with commas; 1 is added."
    )
    n_draws: int = setting(8, "Pairs of opposite noise for each sample.")

    def __post_init__(self) -> None:
        if not all(0 < size < math.inf for size in self.sizes):
            raise UserError(f"Sizes of noise are numbers above zero, in steps; got {', '.join(map(str, self.sizes))}.")
        if self.n_draws < 2:
            raise UserError("An error needs at least 2 draws a sample (n_draws).")


@documented
@dataclass(frozen=True)
class OscillationSettings:
    """Of `oscillation`."""

    eps: float = setting(0.1, "What counts as near a threshold, in steps.")

    def __post_init__(self) -> None:
        if not 0 < self.eps < 0.5:
            raise UserError(
                f"eps is {self.eps}, and must lie between 0 and 0.5: a weight is never further from a threshold."
            )


# By name, in the order of figures and commands.
MEASURES = {
    "output_variance": Measure(
        "Output variance",
        "the variance of the outputs under Gaussian noise in the inputs",
        "variance",
        "variance",
        "variance:OutputVariance",
        """Variance of every checkpoint's output under Gaussian noise in the input, and Figure 1.

        The noise's standard deviation is in units of the normalised input.

        What was measured before is not measured again.

        [bold]Examples[/bold]

          fpq-analyze variance --ckpt-dir checkpoints/

          fpq-analyze variance --ckpt-dir checkpoints/ --sd 0.1 --sd 0.3 --n-draws 16
        """,
        VarianceSettings,
        show="print_variances",
        pictures=(Picture("1", "Figure 1", "figure1:figure1", "figure1:caption1", last=True, single=True),),
    ),
    "gradnorm": Measure(
        "Gradient norm",
        "the norm of the gradient of the loss",
        "gradnorm",
        "gradnorm",
        "gradnorm:GradNorm",
        """Gradient norm of every checkpoint: clean, with noise in features, with noise in weights; and Figure 2.

        The noise is one quantization step wide, in every convolution's input or weight. With as many samples as four
        minibatches or more the figure's intervals are of use. What was measured before is not measured again.

        [bold]Examples[/bold]

          fpq-analyze gradnorm --ckpt-dir checkpoints/

          fpq-analyze gradnorm --ckpt-dir checkpoints/lsq-w4a4 --n-data 4096
        """,
        GradNormSettings,
        show="print_norms",
        pictures=(Picture("2", "Figure 2", "figure2:figure2", "figure2:caption2"),),
    ),
    "features": Measure(
        "Features",
        "the activations of one layer, by channel",
        "features",
        "features",
        "features:Features",
        """One layer in every checkpoint: ranges by channel (Figure 3) and densities of three samples (Figure 4).

        A layer is named as in model.named_modules(); NAME:input is what goes into NAME before its quantizer.

        What was measured before is not measured again.

        [bold]Examples[/bold]

          fpq-analyze features --ckpt-dir checkpoints/

          fpq-analyze features --ckpt-dir checkpoints/ --layer stages.1.1.relu1
        """,
        FeatureSettings,
        show="print_features",
        pictures=(
            Picture("3", "Figure 3", "figure3:figure3", "figure3:caption3", last=True, single=True),
            Picture("4", "Figure 4", "figure4:figure4", "figure4:caption4", last=True),
        ),
    ),
    "hessian_trace": Measure(
        "Trace of the Hessian",
        "the trace of the Hessian",
        "tutorial",
        "hessian",
        "trace:HessianTrace",
        pictures=(Picture("5", "Figure 5", "figure5:figure5", "figure5:caption5"),),
    ),
    "gauss_newton_trace": Measure(
        "Trace of the Gauss-Newton matrix",
        "the trace of the Gauss-Newton matrix",
        "losses",
        "hessian --operator gauss-newton",
        "trace:GaussNewtonTrace",
    ),
    "hessian_eigs": Measure(
        "Eigenvalues",
        "extreme eigenvalues of the Hessian",
        "tutorial",
        "hessian --top-k 5",
        "eigs:HessianEigs",
        pictures=(
            Picture("eigenvalues", "Eigenvalues", "eigenvalues:eigenvalue_figure", "eigenvalues:eigenvalue_caption"),
        ),
    ),
    "hessian_density": Measure(
        "Moments of the spectral density",
        "the spectral density of the Hessian",
        "tutorial",
        "hessian --density",
        "density:HessianDensity",
        pictures=(Picture("density", "Density", "density:density_figure", "density:density_caption", single=True),),
    ),
    "sharpness": Measure(
        "Sharpness", "the sharpness of the minimum", "sharpness", "hessian --sharpness", "sharpness:Sharpness"
    ),
    "landscape": Measure(
        "Landscape",
        "the loss on a plane through weight space",
        "landscape",
        "landscape",
        None,
        pictures=(
            Picture("landscape", "Landscape", "landscape:landscape_figure", "landscape:landscape_caption", single=True),
            Picture("surface", "Surface", "landscape:surface_figure", "landscape:landscape_caption"),
        ),
    ),
    "drift": Measure(
        "Drift",
        "the drift of the features of all convolutions from those of the float network",
        "drift",
        "drift",
        "drift:Drift",
        """How far each quantized run's features have drifted from those of the float run it started from.

        At the output of every convolution, on the same samples; as a table, against the epoch, and layer by layer.

        What was measured before is not measured again.

        [bold]Example[/bold]

          fpq-analyze drift --ckpt-dir checkpoints/
        """,
        headings={"mean_shift": "Mean shift", "decorrelation": "1 - correlation", "wasserstein": "Wasserstein"},
        note=(
            "Shift and Wasserstein-1 distance in standard deviations of the float channels; means over channels and "
            "convolutions. ±: 95 % over the samples, not over runs."
        ),
        pictures=(
            Picture("drift", "Drift", "drift:drift_figure", "drift:drift_caption"),
            Picture("drift_layers", "Drift by layer", "drift:drift_layer_figure", "drift:drift_caption", single=True),
        ),
        quantized=True,
    ),
    "noise": Measure(
        "Noise",
        "the increase of the loss under uniform noise in the features",
        "noise",
        "noise",
        "noise:NoiseResponse",
        """Loss under FPQ's noise in the features, against what the trace of the Hessian predicts to second order.

        At every quantized run's last epoch, with noise in all convolutions at once and in each alone.

        [bold]Examples[/bold]

          fpq-analyze noise --ckpt-dir checkpoints/

          fpq-analyze noise --ckpt-dir checkpoints/fpq --sizes 0.01,0.1,1 --n-draws 32
        """,
        NoiseSettings,
        shared={"epochs": "last"},
        show="print_responses",
        quantized=True,
        pictures=(Picture("noise", "Noise", "noise:noise_figure", "noise:noise_caption", last=True, single=True),),
    ),
    "oscillation": Measure(
        "Oscillation",
        "the shares of the weights that lie near a rounding threshold and that changed their level",
        "oscillation",
        "oscillation",
        "oscillation:Oscillation",
        """Weights near a rounding threshold, and weights on another level than at the checkpoint before.

        Every quantized weight is counted; no sample is looked at.

        [bold]Example[/bold]

          fpq-analyze oscillation --ckpt-dir checkpoints/
        """,
        OscillationSettings,
        fixed={"n_data": 2, "seed": 0},  # the samples play no part; two are the fewest that a measurement takes
        show="print_shares",
        quantized=True,
        pictures=(
            Picture("oscillation", "Oscillation", "oscillation:oscillation_figure", "oscillation:oscillation_caption"),
        ),
    ),
}
