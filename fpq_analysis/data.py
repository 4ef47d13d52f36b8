"""Data sets as device tensors: loading, seeded batches, seeded augmentation.

Images are held as uint8 and become float, normalised, one batch at a time.  Everything random is drawn from the seed
and the epoch's number alone, so that epoch k shuffles and augments the same whether or not training was resumed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fpq_analysis.errors import UserError, did_you_mean

# Ways to normalise that have a name: mean and standard deviation of pixels in [0, 1], for one channel or each.
NORMALIZATIONS = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DATASETS = ("digits", "cifar10", "cifar100", "imagefolder")


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) as uint8 and integer labels (N,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
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
        digest = hashlib.sha256(repr((self.mean, self.std, self.classes)).encode())
        if self.resize is not None or self.repeat > 1:
            digest.update(repr((self.resize, self.repeat)).encode())
        for tensor in (self.train.images, self.train.labels):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_dataset(
    name: str, root: str | Path | None = None, *, download: bool = False, image_size: int | None = None
) -> Dataset:
    """Load a data set by name.

    Args:
        name: `digits` (1,797 real 8x8 digits that come with scikit-learn), `cifar10`, `cifar100` (torchvision), or
            `imagefolder` (`root/train/<class>/*` and `root/test/<class>/*`, or one tree `root/<class>/*`, of which a
            fixed fifth of every class becomes the test split; it does not depend on the seed of a run, so that teacher
            and students never see each other's test images).
        root: folder of the files; not used for `digits`.
        download: let torchvision fetch CIFAR into `root`.
        image_size: side to which `imagefolder` images are resized; without it they must all have one size.

    Raises:
        UserError: if the name is unknown or the files are not there; the message says what to run.
    """
    if name == "digits":
        return _digits()
    if name in ("cifar10", "cifar100"):
        return _cifar(name, Path(root or "data"), download)
    if name == "imagefolder":
        if root is None:
            raise UserError("The data set 'imagefolder' needs its folder: --data-root DIR")
        return _imagefolder(Path(root), image_size)
    raise UserError(f"Unknown data set '{name}'{did_you_mean(name, DATASETS)}. Known: {', '.join(DATASETS)}.")


def load_run_data(config: dict[str, Any], root: str | None = None) -> Dataset:
    """The data set of a run's config, prepared as for its network.

    Args:
        root: its folder, if not the one in the config.
    """
    data = load_dataset(config["data"], root or config["data_root"], image_size=config["image_size"])
    feed = config.get("feed")  # of another program's checkpoint, see `runs/foreign.py`
    return data.prepared(**feed) if feed else data


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


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # A histogram of the 256 values per channel: exact in float64 and small in memory for any number of images.
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        p = torch.bincount(channel.flatten().int(), minlength=256).double()
        p /= p.sum()
        mean = (p * values).sum()
        means.append(float(mean))
        stds.append(max(float((p * (values - mean) ** 2).sum().sqrt()), 1e-3))
    return tuple(means), tuple(stds)


def _dataset(name: str, train: Split, test: Split, classes: tuple[str, ...], flip: bool) -> Dataset:
    mean, std = _statistics(train.images)
    return Dataset(name, train, test, classes, mean, std, flip)


def _split_by_class(images: Tensor, labels: Tensor) -> tuple[Split, Split]:
    """A fifth of every class, the same every time, to the test split."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        is_test[members[: max(1, len(members) // 5)]] = True
    return Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test])


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Pixel values are 0..16; the full byte range keeps one convention for every data set.
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    train, test = _split_by_class(images, torch.from_numpy(digits.target).long())
    return _dataset("digits", train, test, tuple("0123456789"), flip=False)


def _cifar(name: str, root: Path, download: bool) -> Dataset:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = [kind(str(root), train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise UserError(
            f"{name} is not in '{root}'. Add --download to fetch it there once, or point --data-root at a folder "
            f"that holds torchvision's files. To try the program without any data, use --data digits."
        ) from error
    except OSError as error:
        raise UserError(
            f"Could not fetch {name} into '{root}': {error}. Check the connection, or copy torchvision's files there."
        ) from error
    train, test = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return _dataset(name, train, test, tuple(parts[0].classes), flip=True)


def _imagefolder(root: Path, image_size: int | None) -> Dataset:
    if not root.is_dir():
        raise UserError(f"No folder '{root}'. --data-root wants train/<class>/* and test/<class>/*, or <class>/*.")
    if (root / "train").is_dir():
        if not (root / "test").is_dir():
            raise UserError(f"'{root}' has train/ but no test/. Add it, or point --data-root at one tree of classes.")
        train, classes = _read_tree(root / "train", image_size)
        test, test_classes = _read_tree(root / "test", image_size)
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise UserError(f"train/ and test/ of '{root}' have different classes; only one of them has: {odd[:5]}.")
        if train.images.shape[1:] != test.images.shape[1:]:
            raise UserError(f"train/ and test/ of '{root}' have images of different size. Give --image-size N.")
    else:
        whole, classes = _read_tree(root, image_size)
        train, test = _split_by_class(whole.images, whole.labels)
    return _dataset("imagefolder", train, test, classes, flip=True)


def _read_tree(root: Path, image_size: int | None) -> tuple[Split, tuple[str, ...]]:
    from PIL import Image, UnidentifiedImageError
    from torchvision.datasets import ImageFolder

    try:
        tree = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise UserError(f"'{root}' is not a tree of classes: {error} Expected {root}/<class>/<image>.") from error
    if len(tree.classes) < 2:
        raise UserError(
            f"'{root}' has one class ('{tree.classes[0]}'), and a classifier needs two or more. "
            "Is --data-root one level too deep, or too high?"
        )
    arrays = []
    for path, _ in tree.samples:
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
                if image_size is not None:
                    picture = picture.resize((image_size, image_size), Image.Resampling.BILINEAR)
                arrays.append(np.asarray(picture))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"Cannot read the image '{path}': {error}. Remove or replace it.") from error
        if arrays[-1].shape != arrays[0].shape:
            raise UserError(
                f"The images of '{root}' differ in size ('{path}' is {arrays[-1].shape[1]}x{arrays[-1].shape[0]}, the "
                f"first is {arrays[0].shape[1]}x{arrays[0].shape[0]}). Give --image-size N to resize them."
            )
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(tree.targets)), tuple(tree.classes)


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def training_batches(
    data: Dataset, batch_size: int, *, seed: int, epoch: int, augment: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of normalised training images for one epoch.

    The last, incomplete batch is left out (other images in each epoch): BatchNorm and the channel statistics of
    distillation are poor on a handful of images.  Augmentation is a random crop from an image padded by an eighth
    of its side, and a mirror flip where the data set allows one.

    Yields:
        (B, C, H, W) float32 channels-last and (B,) int64, on the data set's device.
    """
    images, labels = data.train.images, data.train.labels
    n = len(labels)
    size = min(batch_size, n)
    generator = epoch_generator(seed, epoch, "batches")
    order = torch.randperm(n, generator=generator).to(labels.device)
    pad = max(1, images.shape[-1] // 8)
    shift = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator).to(labels.device)
    mirror = (torch.rand(n, generator=generator) < 0.5).to(labels.device)
    for start in range(0, n - size + 1, size):
        index = order[start : start + size]
        x = images[index]
        if augment:
            x = _crop(x, pad, shift[start : start + size])
            if data.flip:
                x = torch.where(mirror[start : start + size].view(-1, 1, 1, 1), x.flip(-1), x)
        yield data.normalize(x), labels[index]


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
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        yield data.normalize(images), labels


def training_sample(data: Dataset, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` training images drawn without replacement by `seed`, normalised, without augmentation.

    Returns:
        (min(n, N), C, H, W) float32 and labels.  The draw depends on the seed and the number of images only.
    """
    order = torch.randperm(len(data.train), generator=epoch_generator(seed, 0, "sample"))
    index = order[:n].to(data.train.labels.device)
    return data.normalize(data.train.images[index]), data.train.labels[index]
