"""What one layer puts out, channel by channel: ranges, means and quantiles; and its density for single images.

The paper's Figures 3 and 4 (Pang & Cai 2025, arXiv:2503.11159).  Quantization keeps a channel's range about where it
was and moves its mean; a mean that moves away from the float network's is a bias that every later layer gets to see.

A layer is named as in `model.named_modules()` and stands for its output, a (N, C, ...) tensor; `NAME:input` stands for
what goes into NAME before NAME's quantizer.  The latter is for what no module of its own puts out, such as a functional
ReLU, or one module called several times in a block: name the convolution behind it.  `auto` is the middle one, in the
order of execution, of those activations whose output feeds exactly one convolution or linear layer.

Everything is of the raw output.  Where it feeds layers with one input quantizer between them, the same is measured of
what this quantizer makes of it (`quantized_...`); where it feeds several, there is no one answer, and it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, as_batches, full_precision
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction, with_forward
from fpq_analysis.measures import FeatureSettings
from fpq_analysis.models import model_device, model_precision
from fpq_analysis.nests import moved, size, take
from fpq_analysis.probes.point import Point, Rows, stored
from fpq_analysis.probes.result import Result, with_error
from fpq_analysis.probes.sites import find_site, wide
from fpq_analysis.progress import Progress
from fpq_analysis.quantizers import view as take_view

QUANTILES = {"q01": 0.01, "q25": 0.25, "median": 0.5, "q75": 0.75, "q99": 0.99}
# Of the layer, for the quantiles: 512 images of 128 channels of 16x16.
KEPT_VALUES = 2**24
N_IMAGES = 3
BINS = 128  # of a density, at most


@dataclass(frozen=True, repr=False)
class FeatureStatistics(Result):
    """One layer's output over all images and places.

    Attributes:
        layer: its name.
        channels: a row a channel; columns min, q01, q25, median, q75, q99, max, mean, sd (of the values, not of an
            estimate), and mean_sem, the mean's standard error over the images.
        quantized: the same of what the one input quantizer behind the layer makes of it; None if there is not just one.
        sem_data: standard errors over the images of the means over all channels: keys `mean`, and `quantized_mean`.
        images: which samples the densities are of.
        edges: (B + 1,) of their bins: multiples of a power of two, so that the grids of different networks nest.
        densities: (images, B) of the values that are not exactly zero; each integrates to one less its share of zeros.
        n_data: samples.
        n_kept: samples that the quantiles are from.
        seed: of the choice of samples for densities and quantiles.
    """

    layer: str
    channels: pd.DataFrame
    quantized: pd.DataFrame | None
    sem_data: dict[str, float]
    images: np.ndarray
    edges: np.ndarray
    densities: np.ndarray
    n_data: int
    n_kept: int
    seed: int

    probe = "features"

    def rows(self) -> Rows:
        """Rows of the layer: each statistic, a number a channel in `samples`, their mean in `value`.

        Then `density_edges` (value: the bins' width), `density_images` (which of the images measured on; value: how
        many), and `density_1`, ... of these (value: the integral, one less the share of exact zeros).  The last row,
        `channels`, counts them.
        """
        rows: Rows = []
        for prefix, table in (("", self.channels), ("quantized_", self.quantized)):
            for quantity, column in table.items() if table is not None else ():
                sampled = quantity in QUANTILES
                row = _row(prefix + str(quantity), column.mean(), column, self.n_kept if sampled else self.n_data)
                row["sem"] = 0.0 if row["n_data"] == self.n_data else None
                if quantity == "mean":
                    error = self.sem_data[prefix + "mean"]
                    row |= {"sem_data": error, "ci95": 1.96 * error}
                rows.append(row)
        rows.append(_row("density_edges", self.edges[1] - self.edges[0], self.edges, len(self.images)))
        rows.append(_row("density_images", len(self.images), self.images, self.n_data))
        for i, (density, zeros) in enumerate(zip(self.densities, self.zeros, strict=True), 1):
            rows.append(_row(f"density_{i}", 1 - zeros, density, 1))
        rows = [{"layer": self.layer, **row} for row in rows]
        return [*rows, {"layer": "all", **_row("channels", len(self.channels), None, self.n_data)}]

    def headline(self) -> Sequence[tuple[str, str]]:
        """See `Result`: means over the channels."""
        names = ("mean", "sd", "q99", "max", "quantized_mean")
        numbers = [(row["quantity"], with_error(row)) for row in self.rows() if row["quantity"] in names]
        return [("layer", self.layer), *numbers]

    @property
    def zeros(self) -> np.ndarray:
        """(images,) share of values that are exactly zero: the point mass that a ReLU makes."""
        return np.clip(1 - (self.densities * np.diff(self.edges)).sum(1), 0, 1)


def feature_statistics(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    layer: str = FeatureSettings.layer,
    *,
    n_images: int = N_IMAGES,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> FeatureStatistics:
    """Statistics of one layer's output for each channel, and its density for a few samples.

    The model runs as it is, quantizers on, as a copy in eval mode.  Minimum, maximum, mean and standard deviation are
    of every value; quantiles of the values of as many samples, drawn by `seed`, as `KEPT_VALUES` allows.

    Args:
        model: any `nn.Module`.
        batches: a pair (inputs, targets), or any iterable of such pairs (docs/data.md).  Targets are not used.
        layer: `NAME`, `NAME:input` or `auto` (docs/features.md).  Axis 1 of its output are the channels.
        n_images: samples, drawn by `seed`, to give a density for.
        device: where to compute; None for where the model is.
        micro_batch: samples to hold at a time; None chooses by the size of an input.
        forward: how the model is called, a function (model, inputs) to its outputs; None: as docs/data.md says.

    Raises:
        UserError: if there is no such layer, it does not put out one (N, C, ...) tensor a pass, or one of its values is
            not finite.
    """
    where = torch.device(device) if device is not None else model_device(model)
    inputs = [x for x, _ in as_batches(batches, micro_batch)]
    view = take_view(with_forward(model, forward), "dequantized", take(inputs[0], slice(2))).to(where)
    data = [moved(x, where, model_precision(view)) for x in inputs]
    n, one = sum(map(size, data)), take(data[0], slice(1))
    site = find_site(view, layer, one)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shown = order[:n_images].sort().values
    raw, rounded = _Channels(), _Channels() if site.quantizer else None
    single: dict[int, Tensor] = dict.fromkeys(shown.tolist(), torch.empty(0))

    def work(batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return site.values(view, batch[0]), batch[1]

    numbered: list[tuple[Tensor, ...]] = list(zip(data, torch.arange(n).split(list(map(size, data))), strict=True))
    with Progress(n, Features.name, "samples", 1), torch.no_grad(), full_precision():
        n_kept = min(n, max(1, KEPT_VALUES // site.values(view, one).numel()))
        kept = torch.zeros(n, dtype=torch.bool).index_fill_(0, order[:n_kept], True)
        for values, numbers in map_batches(numbered, work):
            raw.add(values, kept[numbers])
            if rounded is not None and site.quantizer is not None:
                rounded.add(site.quantizer(values), kept[numbers])
            single.update({i: v.cpu() for i, v in zip(numbers.tolist(), values, strict=True) if i in single})
    if not raw.finite():
        raise UserError(
            f"The output of '{site.name}' holds values that are not finite on these data. Check the inputs for NaN and "
            "their normalisation, and with fpq-analyze doctor the checkpoint."
        )
    edges, densities = _densities([image.flatten().double().numpy() for image in single.values()])
    sem_data = {"mean": raw.sem_data()} | ({"quantized_mean": rounded.sem_data()} if rounded else {})
    quantized = rounded.table() if rounded else None
    return FeatureStatistics(
        site.name, raw.table(), quantized, sem_data, shown.numpy(), edges, densities, n, n_kept, seed
    )


class _Channels:
    """Statistics by channel, batch after batch."""

    def __init__(self) -> None:
        self.n_images = self.n_values = 0
        self.kept: list[Tensor] = []

    def add(self, values: Tensor, keep: Tensor) -> None:
        """Take in (N, C, places), and keep the images of the (N,) mask for the quantiles."""
        x = wide(values)
        if self.n_images == 0:
            self.shift = x.mean((0, 2))  # sums of squares about a number near the mean do not cancel
            self.low, self.high = x.amin((0, 2)), x.amax((0, 2))
            self.sums = torch.zeros(4, x.shape[1], dtype=x.dtype, device=x.device)
            self.overall = torch.zeros(2, dtype=x.dtype, device=x.device)
        self.low, self.high = torch.minimum(self.low, x.amin((0, 2))), torch.maximum(self.high, x.amax((0, 2)))
        x = x - self.shift[:, None]
        means = x.mean(2)
        self.sums += torch.stack([x.sum((0, 2)), x.square().sum((0, 2)), means.sum(0), means.square().sum(0)])
        overall = means.mean(1)
        self.overall += torch.stack([overall.sum(), overall.square().sum()])
        self.n_images += len(x)
        self.n_values += len(x) * x.shape[2]
        self.kept.append(values[keep.to(values.device)].cpu())

    def finite(self) -> bool:
        return bool(torch.isfinite(self.sums).all())

    def sem_data(self) -> float:
        """Standard error over the images of the mean over all channels."""
        return float(_sem(self.overall[0], self.overall[1], self.n_images))

    def table(self) -> pd.DataFrame:
        """A row a channel, see `FeatureStatistics`."""
        total, squares, of_means, of_squares = self.sums
        offset = total / self.n_values
        found = {
            "mean": self.shift + offset,
            "sd": (squares / self.n_values - offset.square()).clamp(min=0).sqrt(),
            "mean_sem": _sem(of_means, of_squares, self.n_images),
        }
        kept = torch.cat(self.kept).transpose(0, 1).flatten(1).numpy()
        quantiles = np.stack([np.quantile(channel, list(QUANTILES.values())) for channel in kept], 1)
        columns = {"min": self.low, **dict(zip(QUANTILES, quantiles, strict=True)), "max": self.high, **found}
        frame = pd.DataFrame({k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()})
        return frame.rename_axis("channel")


def _sem(total: Tensor, squares: Tensor, n: int) -> Tensor:
    """Standard error of a mean from the sum and the sum of squares of n numbers; NaN for one."""
    if n < 2:
        return torch.full_like(total, math.nan)
    return ((squares - total.square() / n).clamp(min=0) / (n - 1) / n).sqrt()


def _densities(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Edges and a density for each image, on one grid whose width is a power of two: twice as wide holds it exactly."""
    parts = [values[values != 0] for values in images]
    everything = np.concatenate(parts)
    low, high = (float(everything.min()), float(everything.max())) if len(everything) else (0.0, 1.0)
    width = 2.0 ** math.ceil(math.log2(((high - low) or abs(high)) / BINS))
    edges = np.arange(math.floor(low / width), math.floor(high / width) + 2) * width
    counts = [np.histogram(part, edges)[0] / (len(values) * width) for part, values in zip(parts, images, strict=True)]
    return edges, np.stack(counts)


# --- The probe ---


@dataclass(frozen=True)
class Features(FeatureSettings):
    """The probe: `feature_statistics` on a checkpoint.

    Attributes:
        layer: see `feature_statistics`.
    """

    name = "features"
    version = 1
    needs = ()

    def __call__(self, point: Point) -> Rows:
        """Rows: see `FeatureStatistics.rows`."""
        return feature_statistics(point.model, point.batches, self.layer, seed=point.seed).rows()


def _row(quantity: str, value: float, parts: Any, n_data: int) -> dict[str, Any]:
    kind = quantity.removeprefix("quantized_")
    estimator = "quantiles" if kind in QUANTILES else "histogram" if kind.startswith("density_") else "all values"
    samples = None if parts is None else stored(parts)
    return {
        "quantity": quantity,
        "value": float(value),
        "estimator": estimator,
        "n_data": n_data,
        "n_products": 0,
        "samples": samples,
    }
