"""A data set of images: its splits, and how images are prepared for a network.

Images are held as uint8, or in their files, and become float, normalised, one batch at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fpq_analysis.data.folder import CHUNK, ImageFiles
from fpq_analysis.errors import UserError, did_you_mean
from fpq_analysis.nests import raw

# Ways to normalise that have a name: mean and standard deviation of pixels in [0, 1], for one channel or each.
NORMALIZATIONS = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) as uint8, or in files, and integer labels (N,), on one device."""

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, places: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels at these places, a batch each, on the labels' device; files are read ahead."""
        device = self.labels.device
        if isinstance(self.images, ImageFiles):
            for x, some in zip(self.images.read(places), places, strict=True):
                yield x.to(device, non_blocking=True), self.labels[some.to(device)]
        else:
            for some in places:
                yield self.images[some.to(device)], self.labels[some.to(device)]

    def to(self, device: torch.device) -> Split:
        """On a device; of images in files, too many to hold stay there."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and how their images are prepared for a network.

    Attributes:
        mean, std: per-channel statistics of the training images in [0, 1], used to normalise.
        flip: whether mirrored images are valid (not so for digits).
        resize: side to which images are resized when they are normalised; None: as they are.
        repeat: how often the channel of grey images is repeated when they are normalised.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    resize: int | None = None
    repeat: int = 1

    @property
    def channels(self) -> int:
        return self.train.images.shape[1] * self.repeat

    @property
    def size(self) -> int:
        return self.resize or self.train.images.shape[-1]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to float32 with zero mean and unit standard deviation per channel, channels last."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        x = images.float() / 255
        if self.resize is not None:
            x = F.interpolate(x, (self.resize, self.resize), mode="bilinear", antialias=True)
        x = (x.repeat(1, self.repeat, 1, 1) - mean) / std
        return x.contiguous(memory_format=torch.channels_last)

    def prepared(self, *, image_size: int | None, channels: int, normalize: str) -> Dataset:
        """The same images, prepared as another program did for its network.

        Args:
            image_size: side to which they are resized (bilinear, as torchvision does it); None: as they are.
            channels: three for grey images repeated, else as they are.
            normalize: see `parse_normalization`.

        Raises:
            UserError: if the normalisation has another number of channels.
        """
        repeat = channels // self.channels
        mean, std = parse_normalization(normalize) or (self.mean * repeat, self.std * repeat)
        if len(mean) not in (1, channels):
            raise UserError(
                f"--normalize '{normalize}' has {len(mean)} channels, and the images of '{self.name}' have {channels}. "
                "Give one mean and standard deviation for all, or one for each."
            )
        times = channels // len(mean)
        resize = None if self.train.images.shape[-2:] == (image_size, image_size) else image_size
        return replace(self, mean=mean * times, std=std * times, resize=resize, repeat=repeat)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of its data set."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "channels": self.channels,
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "n_train": len(self.train),
            "n_test": len(self.test),
            "fingerprint": self.fingerprint,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the training images, labels and normalisation: it differs wherever two data sets do."""
        about = repr((self.mean, self.std, self.classes))
        if self.resize is not None or self.repeat > 1:
            about += repr((self.resize, self.repeat))

        def computed() -> dict[str, Any]:
            digest = hashlib.sha256(about.encode())
            for images in self.train.images.split(CHUNK):
                digest.update(raw(images))
            digest.update(raw(self.train.labels))
            return {"fingerprint": digest.hexdigest()[:16]}

        if isinstance(self.train.images, ImageFiles):
            return str(self.train.images.kept(about, computed, "fingerprint of the images")["fingerprint"])
        return str(computed()["fingerprint"])


def parse_normalization(text: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of pixels in [0, 1], one for all channels or one for each.

    Args:
        text: `none` (pixels as they are), `half` (0.5 and 0.5: from -1 to 1), `imagenet`, the numbers
            `0.49,0.48,0.45/0.2,0.2,0.2`, or `data`: the training images' own, for which this gives None.

    Raises:
        UserError: for anything else.
    """
    if text == "data":
        return None
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split("/"))
    except ValueError:
        mean, std = (), ()
    if not mean or len(mean) != len(std) or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        known = ("data", *NORMALIZATIONS)
        raise UserError(
            f"'{text}' is no normalisation{did_you_mean(text, known)}. Write {', '.join(known)}, or means and standard "
            "deviations of pixels in [0, 1], for one channel or for each: 0.4914,0.4822,0.4465/0.2470,0.2435,0.2616"
        )
    return mean, std


def statistics(batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of all uint8 images (B, C, H, W), in units of 255."""
    # A histogram of the 256 values per channel: exact in float64 and small in memory for any number of images.
    values = torch.arange(256, dtype=torch.float64) / 255
    counts: list[Tensor] = []
    for images in batches:
        found = [torch.bincount(channel.flatten().int(), minlength=256) for channel in images.unbind(1)]
        counts = [a + b for a, b in zip(counts, found, strict=True)] if counts else found
    means, stds = [], []
    for count in counts:
        p = count.double()
        p /= p.sum()
        mean = (p * values).sum()
        means.append(float(mean))
        stds.append(max(float((p * (values - mean) ** 2).sum().sqrt()), 1e-3))
    return tuple(means), tuple(stds)
