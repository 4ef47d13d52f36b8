"""From per-sample traces to a trace with its two errors, and how many samples and labels to draw for a wanted one.

Each sample's trace t_n (by drawn labels: an estimate of it) is known.  Of P samples handed over, N are drawn without
replacement.  With s2 the variance of the estimates over samples and w the mean variance of one of them over its labels,
b = s2 - w is the variance of the t_n themselves, and

    sem_data^2 = s2 / N            as an estimate for the distribution the samples come from,
    sem^2      = s2 / N - b / P    as an estimate for the P samples handed over (zero if N = P and w = 0).

Where the loss is a mean over positions or weights, T = sum_n a_n / sum_n w_n, t_n = a_n / mean(w), the number that is
divided by is as random as the samples.  To first order T - E T is then the mean of t_n - T u_n, u_n = w_n / mean(w),
and it is their variance that counts for the distribution.

Two stages (Neyman 1934; Cochran 1977, section 5.5, for costs): a pilot gives b and w1, w for one label.  If a forward
pass costs c labels, the error per cost is least with M = (c w1 / b)^(1/2) labels a sample, and the number of samples
follows from the error that is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, merged
from fpq_analysis.curvature.exact import exact_passes, per_sample_traces
from fpq_analysis.losses import Loss
from fpq_analysis.nests import alike, device_of, joined, size, split, take

# Cost of what comes before the labels (forward pass, patches, their products), in labels: measured on ResNet-20.
FORWARD_COST = 1.5
PILOT = 256
ALL = "*"  # no layer can be called so


@dataclass(frozen=True)
class SampleTraces:
    """Traces by layer, and of the whole network under `ALL`.

    Attributes:
        traces: (N,) by layer, for the samples drawn, in the order drawn.
        label_variance: (N,) by layer, of these numbers over their labels; zero when exact.
        population: P, samples handed over.
        n_passes: backward passes over the samples drawn.
        shares: (N,), u_n; None for ones.
    """

    traces: dict[str, Tensor]
    label_variance: dict[str, Tensor]
    population: int
    n_passes: int
    shares: Tensor | None = None

    @property
    def n(self) -> int:
        """N, samples drawn."""
        return len(self.traces[ALL])

    def value(self, layer: str = ALL) -> float:
        """Mean over the samples drawn."""
        return float(self.traces[layer].mean())

    def sem(self, layer: str = ALL) -> float:
        """Standard error as an estimate for the samples handed over."""
        if self.n == self.population:
            return math.sqrt(float(self.label_variance[layer].mean()) / self.n)
        whole, labels = float(self.traces[layer].var()), float(self.label_variance[layer].mean())
        return math.sqrt(max(whole / self.n - max(0.0, whole - labels) / self.population, labels / self.n))

    def sem_data(self, layer: str = ALL) -> float:
        """Standard error as an estimate for the distribution of the samples; NaN for a single one."""
        if self.n < 2:
            return math.nan
        traces = self.traces[layer]
        if self.shares is None:
            return float(traces.std()) / math.sqrt(self.n)
        # Of N < P drawn, the number that is divided by is still that of all P.
        drawn = float(traces.var()) * (1 / self.n - 1 / self.population)
        return math.sqrt(drawn + float((traces - traces.mean() * self.shares).var()) / self.population)


def exact_traces(
    model: nn.Module,
    loss: Loss,
    batches: list[Batch],
    parameters: dict[str, Tensor],
    derivatives: dict[str, Tensor] | None = None,
    gradients: str = "proven",
) -> SampleTraces:
    """Of all samples, without drawing; arguments as for `per_sample_traces`."""
    loss = loss.for_targets(y for _, y in batches)
    parts = per_sample_traces(model, loss, batches, parameters, derivatives=derivatives, gradients=gradients)
    return collected(parts, exact_passes(model, loss, batches[0]), shares_of(loss, batches))


def sampled_traces(
    model: nn.Module,
    loss: Loss,
    batches: list[Batch],
    parameters: dict[str, Tensor],
    derivatives: dict[str, Tensor] | None = None,
    gradients: str = "proven",
    *,
    generator: torch.Generator,
    n_labels: int = 4,
    tol: float | None = None,
) -> SampleTraces:
    """By drawn labels: `n_labels` for every sample; or as few samples and labels as the relative error `tol` needs.

    Args:
        batches, ...: as for `per_sample_traces`; `generator` is a CPU one.
        tol: wanted standard error for all of `batches`, relative to the trace.
    """
    loss = loss.for_targets(y for _, y in batches)

    def by_sample(part: list[Batch], labels: int) -> Iterator[dict[str, Tensor]]:
        of = (model, loss, part, parameters)
        how: Any = {"derivatives": derivatives, "gradients": gradients}
        return per_sample_traces(*of, n_labels=labels, generator=generator, **how)

    def draw(part: list[Batch], labels: int, one_label: dict[str, float] | None = None) -> list[_Part]:
        return [_mean_over_labels(traces, one_label) for traces in by_sample(part, labels)]

    if tol is None:
        return collected(by_sample(batches, n_labels), n_labels, shares_of(loss, batches))
    shares = shares_of(loss, batches)
    found = _to_tolerance(draw, batches, shares, generator, tol, exact_passes(model, loss, batches[0]))
    return found or exact_traces(model, loss, batches, parameters, derivatives, gradients)


def shares_of(loss: Loss, batches: list[Batch]) -> Tensor | None:
    """u_n of all samples, for a loss bound to them; None for ones."""
    parts = [part for part in (loss.shares(y) for _, y in batches) if part is not None]
    return torch.cat(parts) if parts else None


def collected(parts: Iterable[dict[str, Tensor]], n_passes: int, shares: Tensor | None = None) -> SampleTraces:
    """The traces of all samples, from what `per_sample_traces` yields.

    Args:
        parts: (draws, B) by parameter, for one micro-batch after the other.
        n_passes: backward passes they took.
        shares: see `shares_of`.
    """
    traces, variance = _joined([_mean_over_labels(part, None) for part in parts])
    return SampleTraces(traces, variance, len(traces[ALL]), n_passes, shares)


_Part = tuple[dict[str, Tensor], dict[str, Tensor]]


def _to_tolerance(
    draw: Callable[..., list[_Part]],
    batches: list[Batch],
    shares: Tensor | None,
    generator: torch.Generator,
    tol: float,
    exact_passes: int,
) -> SampleTraces | None:
    """None where the sum over classes for every sample is cheaper than what the tolerance would take."""
    population = sum(map(size, batches))
    order = torch.randperm(population, generator=generator).to(device_of(batches[0]))
    whole = joined(list(batches)) if all(alike(batch, batches[0]) for batch in batches) else None
    singles = [] if whole is not None else [one for batch in batches for one in split(batch, 1)]

    def drawn(start: int, stop: int) -> list[Batch]:
        if whole is not None:
            return [take(whole, places) for places in order[start:stop].split(size(batches[0]))]
        return merged([singles[i] for i in order[start:stop].tolist()], size(batches[0]))

    parts = draw(drawn(0, min(PILOT, population)), 2)
    passes = 2 * min(PILOT, population)
    pilot = SampleTraces(*_joined(parts), population, 2)
    one_label = {name: 2 * float(variance.mean()) for name, variance in pilot.label_variance.items()}
    between = max(float(pilot.traces[ALL].var()) - one_label[ALL] / 2, 0.0) if pilot.n > 1 else 0.0
    wanted = (tol * pilot.value()) ** 2
    # The pilot's images keep their two labels; the others get `labels`.  The error from labels alone must stay within
    # what is wanted even when every sample is drawn.
    labels = max(1, round(math.sqrt(FORWARD_COST * one_label[ALL] / between)) if between else 1)
    if wanted > 0:
        labels = max(labels, math.ceil(1.2 * one_label[ALL] / (population * wanted)))
    while labels < exact_passes:
        traces, variance = _joined(parts)
        drawn_shares = None if shares is None else shares[order[: len(traces[ALL])].cpu()]
        n_passes = max(1, round(passes / len(traces[ALL])))
        found = SampleTraces(traces, variance, population, n_passes, drawn_shares)
        if found.sem() <= tol * abs(found.value()) or not math.isfinite(found.value()):
            return found
        if found.n == population:
            break
        wanted = (tol * found.value()) ** 2
        within = one_label[ALL] / labels
        spread = max(float(traces[ALL].var()) - float(variance[ALL].mean()), 0.0)
        needed = 1.1 * (spread + within) / (wanted + spread / population) if wanted else population
        stop = min(population, max(math.ceil(needed), found.n + found.n // 4 + 1))
        parts += draw(drawn(found.n, stop), labels, one_label)
        passes += labels * (stop - found.n)
    return None


def layer_of(parameter: str) -> str:
    """Name of the module that owns a parameter; empty for the model itself."""
    return parameter.rpartition(".")[0]


def layer_blocks(slices: dict[str, slice]) -> dict[str, slice]:
    """By layer, its place in a flat vector, from those of its parameters, which stand side by side."""
    blocks: dict[str, slice] = {}
    for name, place in slices.items():
        blocks[layer_of(name)] = slice(blocks.get(layer_of(name), place).start, place.stop)
    return blocks


def _mean_over_labels(part: dict[str, Tensor], one_label: dict[str, float] | None) -> _Part:
    """By layer, from (draws, B) by parameter: means over the draws, and the variances of these means.

    Args:
        one_label: variance over labels where a single draw tells none of its own.
    """
    layers: dict[str, Tensor] = {}
    for name, draws in part.items():
        layers[layer_of(name)] = layers[layer_of(name)] + draws if layer_of(name) in layers else draws
    layers[ALL] = torch.stack(list(part.values())).sum(0)
    traces = {layer: draws.mean(0) for layer, draws in layers.items()}
    variance = {}
    for layer, draws in layers.items():
        if len(draws) > 1:
            variance[layer] = draws.var(0) / len(draws)
        else:
            variance[layer] = torch.full_like(draws[0], one_label[layer] if one_label else 0.0)
    return traces, variance


def _joined(parts: list[_Part]) -> _Part:
    names = list(parts[0][0])
    traces, variance = ({name: torch.cat([part[i][name] for part in parts]) for name in names} for i in (0, 1))
    return traces, variance
