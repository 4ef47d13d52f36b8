"""Oscillation of quantized weights: how many lie near a rounding threshold, and how many changed their level.

Under a straight-through gradient the trained weight behind a quantized one is pushed to the threshold between two
levels and then jumps from side to side, step after step (Nagel et al. 2022, arXiv:2203.11086).  A rising share near a
threshold means that weights gather there, against 2 `eps` if they lay anywhere with equal chance; a share of flips that
does not fall while the learning rate does means that training does not settle.  Whole numbers are counted, no data are
used, and nothing is estimated.

All is in the quantizer's own units, the codes k = 0 .. 2^bits - 1, between two of which lies a threshold: for DoReFa
behind its tanh.  A weight beyond the grid's ends is as far from a threshold as it is from the outermost one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fpq_analysis.errors import UserError
from fpq_analysis.measures import OscillationSettings
from fpq_analysis.probes.point import Point, Rows
from fpq_analysis.probes.result import Measurement
from fpq_analysis.probes.trace import ROOT
from fpq_analysis.quantizers import Quantizer, adopt, weight_codes, weight_quantizers, widened


def oscillation(model: nn.Module, previous: nn.Module, *, eps: float = OscillationSettings.eps) -> Measurement:
    """Shares of the quantized weights near a rounding threshold, and of those whose code is another than in `previous`.

    A flip is a change of the code k, whatever caused it: the weight, its step size, or (DoReFa) the layer's maximum.

    Args:
        model, previous: one network quantized by `quantize`, at a checkpoint and at the one before; neither is touched.
        eps: what counts as near, in steps; below 1/2, which every place in the grid is near to.

    Returns:
        Four rows for each layer, and for the whole model (layer `all`) last: `near`, the share of the weights less than
        `eps` from a threshold; `flipped`, the share whose code changed; `flipped_step`, the share whose code changed
        though at the old step it would not have; `flipped_near`, the share of the flipped that are near a threshold now
        (left out if none flipped).  `n_weights` is what a share is of: for `flipped_near` the flipped.

    Raises:
        UserError: for an `eps` out of range, a model without quantized weights, or two that are not one network.
    """
    OscillationSettings(eps)  # refuses what makes no sense
    shares = _rows(_counts(model, previous, eps))
    setting = {"layer": "all", "quantity": "eps", "value": eps, "n_weights": 0}
    exact = {"estimator": "counted", "sem": 0.0, "sem_data": 0.0, "ci95": 0.0, "n_data": 0}
    return Measurement(Oscillation.name, [{**row, **exact} for row in (*shares[:-1], setting, shares[-1])])


@dataclass(frozen=True)
class Oscillation(OscillationSettings):
    """The probe: `oscillation` between a checkpoint and the one before.

    Attributes: see `oscillation`.

    Raises:
        UserError: for settings that `oscillation` would refuse.
    """

    name = "oscillation"
    version = 3  # part of a record's key: raise it when the numbers change
    needs = ("quantizers", "previous")

    def __call__(self, point: Point) -> Rows:
        """Rows: the layers' shares; then the network's, and before its last, `eps` and `previous`.

        `previous` is the epoch that flips are counted from: across a missing checkpoint they are those of several.
        """
        assert point.previous is not None
        rows = oscillation(point.model, point.previous, eps=self.eps).rows()
        if point.previous_epoch is not None:
            rows.insert(-1, {**rows[-2], "quantity": "previous", "value": point.previous_epoch})
        return [{column: value for column, value in row.items() if column != "n_weights"} for row in rows]


@torch.no_grad()
def _counts(model: nn.Module, previous: nn.Module, eps: float) -> dict[str, Tensor]:
    """By layer, [weights, near, flipped, flipped by the step, flipped and near]."""
    model, previous = adopt(model), adopt(previous)
    now, before = weight_quantizers(model), weight_quantizers(previous)
    if not now:
        raise UserError(
            "The model has no quantized weights, so none can oscillate. Quantize it: quantize(model, spec)."
        )
    if {n: w.shape for n, (_, w) in now.items()} != {n: w.shape for n, (_, w) in before.items()}:
        raise UserError("The two models are not one network at two epochs: their quantized layers differ.")
    codes = weight_codes(previous)
    counts = {}
    for name, (quantizer, weight) in now.items():
        near = threshold_distance(quantizer, weight) < eps
        flipped = quantizer.codes(weight) != codes[name].to(weight.device)
        old, _ = before[name]
        stayed = old.codes(weight.to(old.step_size.device)) == codes[name]
        by_step = flipped & stayed.to(weight.device)
        found = torch.stack([near.sum(), flipped.sum(), by_step.sum(), (flipped & near).sum()])
        counts[name or ROOT] = torch.cat([torch.tensor([weight.numel()]), found.cpu()])
    counts["all"] = torch.stack(list(counts.values())).sum(0)
    return counts


def threshold_distance(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Distance to the nearest rounding threshold, in steps, shape of x: at most 1/2 within the grid."""
    position = quantizer.position(widened(x))
    threshold = position.floor().clamp(0, quantizer.levels - 1) + 0.5
    return (position - threshold).abs()


def _rows(counts: dict[str, Tensor]) -> Rows:
    rows: Rows = []
    for layer, found in counts.items():
        total, near, flipped, by_step, both = (int(count) for count in found)
        shares = {
            "near": (near, total),
            "flipped_step": (by_step, total),
            "flipped_near": (both, flipped),
            "flipped": (flipped, total),
        }
        for quantity, (part, whole) in shares.items():
            if whole:  # where none flipped, there is no share of them
                rows.append({"layer": layer, "quantity": quantity, "value": part / whole, "n_weights": whole})
    return rows
