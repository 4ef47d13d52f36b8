"""How far a quantized network's features have drifted from those of the float network it started from.

Of every convolution's raw output, before BatchNorm, as in FPQ's distillation (Pang & Cai 2025, arXiv:2503.11159,
Eq. 15-17), for each channel over all images and places, in one forward pass of each network over the same images.  With
s the student's values, t the teacher's, and sd(t) the unit:

- `mean_shift`: (mean(s) - mean(t)) / sd(t), signed for a channel; its size is averaged over channels.  A bias.
- `decorrelation`: 1 - corr(s, t): what no shift and no scaling of the channel can mend.  Eq. 17's distance of the
  standardised channels is twice that a value (but for the epsilon in Eq. 15).
- `wasserstein`: mean |sorted s - sorted t| / sd(t), the Wasserstein-1 distance of the two distributions: how much
  probability moved how far, whichever value became which.  At least |mean_shift|.

A rising curve means that training leads the quantized network away from the float one; this is what CSD holds back, and
it is not bad by itself.  A student's channel that is constant has correlation 0.  A teacher's channel that is constant
(sd below 1e-5 of the layer's largest) has no unit: it is left out, and counted as `constant_channels`.

Errors are over the images, by a jackknife that leaves out one of 20 random blocks of images at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, as_batches, full_precision
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction, running, with_forward
from fpq_analysis.intervals import half_interval
from fpq_analysis.models import model_device, model_precision
from fpq_analysis.nests import Nest, moved, size, take
from fpq_analysis.probes.point import Point, Rows, stored
from fpq_analysis.probes.result import Result
from fpq_analysis.probes.sites import by_channel, wide
from fpq_analysis.progress import Progress
from fpq_analysis.quantizers import view as take_view
from fpq_analysis.quantizers.apply import CONVOLUTIONS

QUANTITIES = ("wasserstein", "decorrelation", "mean_shift")
BLOCKS = 20
CONSTANT = 1e-5  # a standard deviation, relative to the layer's largest
# Of each network, for the Wasserstein distance: of ResNet-18, 3 places of each of 512 images.
KEPT_VALUES = 2**23


@dataclass(frozen=True, repr=False)
class FeatureDrift(Result):
    """The drift of every convolution.

    Attributes:
        table: a row for each layer and quantity, those of the whole network (layer `all`: means over the layers) last;
            columns layer, quantity, value, sem_data, ci95.
        channels: a row for each layer and channel: layer, channel, and the three quantities, `mean_shift` signed; NaN
            where the teacher's channel is constant.
        blocks: of the whole network, quantity to (blocks,) jackknife values, whose mean is the value and whose standard
            deviation over the root of their number is its standard error; those of two networks compare in pairs.
        n_data: samples.
        n_kept: samples that the Wasserstein distance is from.
        places: layer to its number of places, of which each of these samples gives `n_places` at most.
        seed: of the choice of samples, places and blocks.
    """

    table: pd.DataFrame
    channels: pd.DataFrame
    blocks: dict[str, np.ndarray]
    n_data: int
    n_kept: int
    n_places: int
    places: dict[str, int]
    seed: int

    probe = "drift"

    def rows(self) -> Rows:
        """Each layer's, a number a channel in `samples`; then the network's, a number a block of images there.

        `constant_channels` has in `samples` which ones, and those are not among the samples of the other quantities.
        """
        by_layer = dict(list(self.channels.groupby("layer", sort=False)))
        rows: Rows = []
        for row in self.table.to_dict("records"):
            layer, quantity = str(row["layer"]), str(row["quantity"])
            parts: Any = None
            if layer == "all":
                parts = self.blocks.get(quantity)
            elif quantity == "constant_channels":
                parts = by_layer[layer].loc[by_layer[layer]["mean_shift"].isna(), "channel"]
            else:
                parts = by_layer[layer][quantity].dropna()
            samples = None if parts is None else stored(parts)
            how = {"estimator": "all values", "n_data": self.n_data, "n_products": 0, "sem": 0.0}
            if quantity == "wasserstein" and self.subsampled(layer):
                how |= {"estimator": f"up to {self.n_places} places an image", "n_data": self.n_kept, "sem": None}
            rows.append({str(k): v for k, v in row.items()} | how | {"samples": samples})
        return rows

    def subsampled(self, layer: str) -> bool:
        """Whether the layer's Wasserstein distance (that of `all` layers) is from a part of the values."""
        most = max(self.places.values()) if layer == "all" else self.places[layer]
        return self.n_kept < self.n_data or self.n_places < most


def feature_drift(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    forward: ForwardFunction | None = None,
) -> FeatureDrift:
    """Mean shift, decorrelation and Wasserstein distance of every convolution's channels from the teacher's.

    Both networks run as they are, as copies in eval mode.  Means and correlations are of every value.  The Wasserstein
    distance is of the same values of both networks: all, or if these are more than `KEPT_VALUES`, those of as many
    random places, and then images, as fit.  It is never negative, so that a sample of M values a channel has an
    expectation of up to about 1/sqrt(M) where the truth is zero.

    Args:
        model: any `nn.Module` with convolutions.
        teacher: another, of the same architecture.
        batches: a pair (inputs, targets), or any iterable of such pairs (docs/data.md).  Targets are not used.
        seed: of the choice of samples, places and jackknife blocks.  Networks measured with one seed compare in pairs.
        device: where to compute; None for where the model is.
        micro_batch: samples to hold at a time; None chooses by the size of an input.
        forward: how the model is called, a function (model, inputs) to its outputs; None: as docs/data.md says.

    Raises:
        UserError: if the networks' convolutions differ, there is none, or a value is not finite.
    """
    where = torch.device(device) if device is not None else model_device(model)
    inputs = [x for x, _ in as_batches(batches, micro_batch)]
    networks = (with_forward(network, forward) for network in (model, teacher))
    student, teacher = (take_view(net, "dequantized", take(inputs[0], slice(2))).to(where) for net in networks)
    kinds = [kind for kind in map(model_precision, (student, teacher)) if kind is not None]
    if len(kinds) == 2:  # in the finer of both
        student, teacher = (net.to(torch.promote_types(*kinds)) for net in (student, teacher))
    pair = _Pair(student, teacher)
    data = [moved(x, where, model_precision(student)) for x in inputs]
    n = sum(map(size, data))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    n_blocks = min(BLOCKS, n)
    block = torch.empty(n, dtype=torch.long).index_copy_(0, order, torch.arange(n) % n_blocks)

    with Progress(n, Drift.name, "samples", 1), torch.no_grad(), full_precision():
        first = pair(take(data[0], slice(1)))
        width = sum(s.shape[1] for s, _ in first.values())
        n_kept = min(n, max(1, KEPT_VALUES // width))
        n_places = min(max(1, KEPT_VALUES // (width * n_kept)), max(s.shape[2] for s, _ in first.values()))
        row_of = torch.full((n,), -1).index_copy_(0, order[:n_kept], torch.arange(n_kept))
        layers = {name: _Layer(s, n_blocks, n_kept, n_places, generator) for name, (s, _) in first.items()}

        def work(batch: tuple[Tensor, ...]) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
            return pair(batch[0]), batch[1]

        numbered: list[tuple[Tensor, ...]] = list(zip(data, torch.arange(n).split(list(map(size, data))), strict=True))
        for outputs, numbers in map_batches(numbered, work):
            for name, (s, t) in outputs.items():
                layers[name].add(s, t, block[numbers], row_of[numbers])
    blocks_kept = block[order[:n_kept]]
    table, channels, blocks = _together({name: layer.result(blocks_kept) for name, layer in layers.items()})
    places = {name: layer.n_places for name, layer in layers.items()}
    return FeatureDrift(table, channels, blocks, n, n_kept, n_places, places, seed)


class _Pair:
    """Student and teacher: the outputs of their convolutions for the same images."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = student, teacher
        ours, theirs = (_convolutions(network) for network in (student, teacher))
        if not ours:
            raise UserError("The network has no convolution, and drift is measured at the outputs of convolutions.")
        widths = [{name: layer.out_channels for name, layer in side.items()} for side in (ours, theirs)]
        if widths[0] != widths[1]:
            names = sorted({name for name, _ in widths[0].items() ^ widths[1].items()})[:3]
            raise UserError(
                f"The teacher is another network than the model: their convolutions differ at {', '.join(names)}. "
                "Drift compares layer by layer, so both must have one architecture."
            )

    def __call__(self, x: Nest) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer that runs, both outputs as (N, C, places)."""
        ours, theirs = _outputs(self.student, x), _outputs(self.teacher, x)
        both = {name: (ours[name], theirs[name]) for name in ours if name in theirs}
        for name, (s, t) in both.items():
            if s.shape != t.shape:
                raise UserError(
                    f"At '{name}' the model puts out {s.shape[2]} places an image, the teacher {t.shape[2]}."
                )
        return both


def _convolutions(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, CONVOLUTIONS)}


def _outputs(model: nn.Module, x: Nest) -> dict[str, Tensor]:
    """Of a layer called more than once, the last call's, as in distillation."""
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, layer in _convolutions(model).items():

            def keep(layer: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                found[name] = by_channel(output.detach().clone())  # what comes behind may work in place

            hooks.enter_context(layer.register_forward_hook(keep))
        with running(x):
            model(x)
    return found


@dataclass(frozen=True)
class _Drift:
    """Of one layer, by quantity: (channels,) values, and (blocks, channels) values with one block of images left out.

    Attributes:
        constant: (channels,) whether the teacher's channel is.
    """

    values: dict[str, np.ndarray]
    without: dict[str, np.ndarray]
    constant: np.ndarray


class _Layer:
    """Sums and a sample of the values of one layer, batch after batch."""

    def __init__(self, like: Tensor, n_blocks: int, n_kept: int, n_places: int, generator: torch.Generator) -> None:
        _, channels, self.n_places = like.shape
        taken = min(n_places, self.n_places)
        # Places in random order for each kept image; all of them need no drawing.
        self.places = (
            torch.rand(n_kept, self.n_places, generator=generator, dtype=torch.float32).topk(taken).indices
            if taken < self.n_places
            else torch.arange(taken).expand(n_kept, taken)
        )
        self.kept = [torch.empty(n_kept, channels, taken, dtype=like.dtype) for _ in range(2)]
        self.counts = torch.zeros(n_blocks, dtype=torch.float64)
        self.sums = torch.zeros(n_blocks, 5, channels, dtype=torch.float64)
        self.shifts: list[Tensor] = []

    def add(self, student: Tensor, teacher: Tensor, block: Tensor, row: Tensor) -> None:
        """Take in (N, C, places) of both.

        Args:
            block: (N,) of each image.
            row: (N,) where the image's sample goes, -1 for none.
        """
        images = (row >= 0).nonzero().flatten()
        places = self.places[row[images]][:, None].expand(-1, student.shape[1], -1).to(student.device)
        for kept, values in zip(self.kept, (student, teacher), strict=True):
            kept[row[images]] = values[images.to(values.device)].gather(2, places).cpu()
        s, t = wide(student), wide(teacher)
        # Sums of squares about a number near the mean do not cancel.
        self.shifts = self.shifts or [s.mean((0, 2)), t.mean((0, 2))]
        s, t = s - self.shifts[0][:, None], t - self.shifts[1][:, None]
        sums = [s.sum(2), t.sum(2), s.square().sum(2), t.square().sum(2), (s * t).sum(2)]
        self.sums.index_add_(0, block, torch.stack(sums, 1).cpu())
        self.counts.index_add_(0, block, torch.full((len(s),), float(s.shape[2]), dtype=torch.float64))

    def result(self, blocks_kept: Tensor) -> _Drift:
        """Both with all images and without each block.

        Args:
            blocks_kept: (kept images,) their blocks.
        """
        parts, counts = self.sums.numpy(), self.counts.numpy()
        shift = (self.shifts[0] - self.shifts[1]).cpu().numpy()
        total, sizes = parts.sum(0), counts.sum()
        whole, sd, largest = _moments(total[None], np.array([sizes]), shift)
        part, part_sd, _ = _moments(total - parts, sizes - counts, shift)
        whole["wasserstein"], part["wasserstein"] = self._wasserstein(blocks_kept, len(counts))
        with np.errstate(divide="ignore", invalid="ignore"):
            whole["wasserstein"], part["wasserstein"] = whole["wasserstein"] / sd, part["wasserstein"] / part_sd
        return _Drift({name: v[0] for name, v in whole.items()}, part, sd[0] <= CONSTANT * largest[0])

    def _wasserstein(self, blocks_kept: Tensor, n_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """(1, C) mean |sorted s - sorted t|, and (blocks, C) the same without each block of images; sorted but once."""
        n_channels, places = self.kept[0].shape[1:]
        block = blocks_kept.to(torch.uint8).repeat_interleave(places)
        ordered = [kept.transpose(0, 1).flatten(1).sort(1) for kept in self.kept]
        self.kept.clear()
        labels = [block[order] for _, order in ordered]

        def distance(left_out: int | None) -> Tensor:
            s, t = (
                values
                if left_out is None
                else values[label != left_out].view(n_channels, int((block != left_out).sum()))
                for (values, _), label in zip(ordered, labels, strict=True)
            )
            return (s - t).abs().mean(1, dtype=torch.float64)

        return distance(None)[None].numpy(), torch.stack([distance(b) for b in range(n_blocks)]).numpy()


def _moments(
    sums: np.ndarray, n: np.ndarray, shift: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Mean shift and decorrelation from (k, 5, C) sums of (k,) values; (k, C) sds and (k, 1) the largest of each."""
    s, t, ss, tt, st = np.moveaxis(sums / np.maximum(n, 1)[:, None, None], 1, 0)
    var_s, var_t = np.maximum(ss - s**2, 0), np.maximum(tt - t**2, 0)
    sd = np.sqrt(var_t)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = np.where(var_s > 1e-18 * var_t, (st - s * t) / np.sqrt(var_s * var_t), 0.0)  # 0: all rounding
        return (
            {"decorrelation": 1 - np.minimum(correlation, 1), "mean_shift": (s - t + shift) / sd},
            sd,
            sd.max(1, keepdims=True),
        )


# --- Layers together ---


def _jackknife(value: float, without: np.ndarray) -> np.ndarray:
    """(blocks,) numbers with the given mean, whose spread is the jackknife's: sd / sqrt(blocks) is its error."""
    n = len(without)
    return value + (n - 1) * (without.mean() - without) if n > 1 else np.full(n, math.nan)


def _row(layer: str, quantity: str, value: float, blocks: np.ndarray) -> dict[str, Any]:
    n = len(blocks)
    sem = float(blocks.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    half = half_interval(sem, n - 1) if n > 1 else math.nan
    return {"layer": layer, "quantity": quantity, "value": float(value), "sem_data": sem, "ci95": half}


def _together(found: dict[str, _Drift]) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, np.ndarray]]:
    """Means over channels and over layers, with their errors: `table`, `channels` and `blocks` of `FeatureDrift`."""
    rows, channels = [], []
    means: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
    without: dict[str, list[np.ndarray]] = {quantity: [] for quantity in QUANTITIES}
    for name, layer in found.items():
        living = ~layer.constant
        count = float(layer.constant.sum())
        rows.append({"layer": name, "quantity": "constant_channels", "value": count, "sem_data": None, "ci95": None})
        by_channel = {quantity: np.where(living, layer.values[quantity], np.nan) for quantity in reversed(QUANTITIES)}
        channels.append(pd.DataFrame({"layer": name, "channel": np.arange(len(living)), **by_channel}))
        for quantity in QUANTITIES if living.any() else ():
            mean = float(np.abs(layer.values[quantity][living]).mean())
            if not math.isfinite(mean):
                raise UserError(
                    f"The output of '{name}' holds values that are not finite on these data. Check the inputs for NaN "
                    "and their normalisation, and with fpq-analyze doctor the checkpoint."
                )
            means[quantity].append(mean)
            without[quantity].append(np.abs(layer.without[quantity][:, living]).mean(1))
            rows.append(_row(name, quantity, mean, _jackknife(mean, without[quantity][-1])))
    if not means[QUANTITIES[0]]:
        raise UserError("Every channel of every convolution of the teacher is constant on these data.")
    constant = sum(float(layer.constant.sum()) for layer in found.values())
    rows.append({"layer": "all", "quantity": "constant_channels", "value": constant, "sem_data": None, "ci95": None})
    blocks = {}
    for quantity in QUANTITIES:
        mean = float(np.mean(means[quantity]))
        blocks[quantity] = _jackknife(mean, np.mean(without[quantity], 0))
        rows.append(_row("all", quantity, mean, blocks[quantity]))
    return pd.DataFrame(rows), pd.concat(channels, ignore_index=True), blocks


# --- The probe ---


@dataclass(frozen=True)
class Drift:
    """The probe: `feature_drift` of a checkpoint from the float network its run started from."""

    name = "drift"
    version = 2  # part of a record's key: raise it when the numbers change
    needs = ("quantizers", "teacher")

    def __call__(self, point: Point) -> Rows:
        """Rows: see `FeatureDrift.rows`."""
        assert point.teacher is not None
        return feature_drift(point.model, point.teacher, point.batches, seed=point.seed).rows()
