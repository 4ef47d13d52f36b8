"""Is the loss a mean over samples?  What every method assumes, tried on a few of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, full_precision


class MixedSamplesError(Exception):
    """The model's output for one sample depends on the others, so its loss is not a sum over samples."""


def check_samples_apart(model: nn.Module, batches: list[Batch]) -> None:
    """Raise `MixedSamplesError` if an image's output changes with the images beside it."""
    x = spread(batches, 3)
    if len(x) < 2:
        return
    with torch.no_grad(), full_precision():
        together = model(x)
        # Each image among copies of itself, at its own place in a batch of the same size: of another size, rounding
        # would differ, and behind a quantizer flip levels, which is no smaller than what mixing does.
        alone = torch.cat([model(torch.empty_like(x).copy_(image))[i : i + 1] for i, image in enumerate(x)])
    if not bool(torch.isfinite(alone).all()):
        return  # nothing to compare; the measurement will not be finite, and says so
    scale = alone.abs().max()
    if together.shape != alone.shape or not bool((together - alone).abs().max() <= 1e-2 * scale):
        raise MixedSamplesError


def spread(batches: list[Batch], n: int, turn: int = 0) -> Tensor:
    """`n` inputs spread evenly over all batches, others each turn; repeated if there are fewer."""
    total = sum(len(x) for x, _ in batches)
    wanted = [(turn + (i * total // n if n <= total else i)) % total for i in range(n)]
    starts, images = 0, {}
    for x, _ in batches:
        images.update({i: x[i - starts] for i in set(wanted) if starts <= i < starts + len(x)})
        starts += len(x)
    return torch.stack([images[i] for i in wanted])
