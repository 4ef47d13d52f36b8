"""Batches of a data set of images: shuffled and augmented for training, in order, or a fixed sample.

Everything random is drawn from the seed and the epoch's number alone, so that epoch k shuffles and augments the same
whether or not training was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fpq_analysis.data.dataset import Dataset, Split
from fpq_analysis.data.folder import CHUNK
from fpq_analysis.devices import free_memory
from fpq_analysis.errors import UserError
from fpq_analysis.ranks import share


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def training_batches(
    data: Dataset, batch_size: int, *, seed: int, epoch: int, augment: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of normalised training images for one epoch; of each, this rank's share (`ranks/division.py`).

    The last, incomplete batch is left out (other images in each epoch): BatchNorm and the channel statistics of
    distillation are poor on a handful of images.  Augmentation is a random crop from an image padded by an eighth
    of its side, and a mirror flip where the data set allows one.

    Yields:
        (B, C, H, W) float32 channels-last and (B,) int64, on the data set's device.
    """
    n, device = len(data.train), data.train.labels.device
    size = min(batch_size, n)
    generator = epoch_generator(seed, epoch, "batches")
    order = torch.randperm(n, generator=generator)
    pad = max(1, data.train.images.shape[-1] // 8)
    shift = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator)
    mirror = torch.rand(n, generator=generator, dtype=torch.float32) < 0.5
    rows = [share([torch.arange(start, start + size)])[0] for start in range(0, n - size + 1, size)]
    for own, (x, y) in zip(rows, data.train.batches([order[own] for own in rows]), strict=True):
        if augment:
            x = _crop(x, pad, shift[own].to(device))
            if data.flip:
                x = torch.where(mirror[own].to(device).view(-1, 1, 1, 1), x.flip(-1), x)
        yield data.normalize(x), y


def _crop(x: Tensor, pad: int, shift: Tensor) -> Tensor:
    """Cut each image of (B, C, H, W) out of its zero-padded self at its own `shift` (B, 2)."""
    height, width = x.shape[-2:]
    rows = shift[:, :1] + torch.arange(height, device=x.device)
    columns = shift[:, 1:] + torch.arange(width, device=x.device)
    batch = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    return F.pad(x, (pad, pad, pad, pad))[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def evaluation_batches(data: Dataset, split: Split, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """All of `split` in order, normalised, without augmentation."""
    for images, labels in split.batches(torch.arange(len(split)).split(batch_size)):
        yield data.normalize(images), labels


def sample_order(n: int, n_data: int | None, seed: int) -> Tensor:
    """Places of `n_data` of n samples (None: of all), drawn without replacement by `seed`."""
    return torch.randperm(n, generator=epoch_generator(seed, 0, "sample"))[:n_data]


def training_sample(data: Dataset, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` training images drawn without replacement by `seed`, normalised, without augmentation.

    Returns:
        (min(n, N), C, H, W) float32 and labels.  The draw depends on the seed and the number of images only.

    Raises:
        UserError: if they would not fit into memory.
    """
    index = sample_order(len(data.train), n, seed)
    side, device = data.size, data.train.labels.device
    needed, free = 9 * len(index) * data.channels * side**2, free_memory(device)  # uint8, and on the way twice float32
    if needed > free:
        raise UserError(
            f"{len(index):,} images of {side}x{side} pixels take {needed / 1e9:.1f} GB to measure on, and "
            f"{free / 1e9:.1f} GB are free on '{device}'. Measure on fewer (--n-data N)."
        )
    parts = list(data.train.batches(index.split(CHUNK)))
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return data.normalize(images), labels
