"""The data sets that are known by a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpq_analysis.choices import unknown_data
from fpq_analysis.data.dataset import Dataset, Split, statistics
from fpq_analysis.data.folder import CHUNK, ImageFiles, Tree
from fpq_analysis.errors import UserError


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
    raise unknown_data(name)


def load_run_data(config: dict[str, Any], root: str | None = None) -> Dataset:
    """The data set of a run's config, prepared as for its network.

    Args:
        root: its folder, if not the one in the config.
    """
    data = load_dataset(config["data"], root or config["data_root"], image_size=config["image_size"])
    feed = config.get("feed")  # of another program's checkpoint, see `runs/foreign.py`
    return data.prepared(**feed) if feed else data


def _dataset(name: str, train: Split, test: Split, classes: tuple[str, ...], flip: bool) -> Dataset:
    return Dataset(name, train, test, classes, *_statistics(train.images), flip)


def _split_by_class(images: Tensor | ImageFiles, labels: Tensor) -> tuple[Split, Split]:
    """A fifth of every class, the same every time, to the test split."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        is_test[members[: max(1, len(members) // 5)]] = True
    if isinstance(images, ImageFiles):
        return Split(images.some(~is_test), labels[~is_test]), Split(images.some(is_test), labels[is_test])
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
        trees = [Tree.below(root / part) for part in ("train", "test")]
        classes, test_classes = (tree.classes for tree in trees)
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise UserError(f"train/ and test/ of '{root}' have different classes; only one of them has: {odd[:5]}.")
        train, test = (Split(ImageFiles(tree, image_size), tree.labels) for tree in trees)
        if train.images.shape[1:] != test.images.shape[1:]:
            raise UserError(f"train/ and test/ of '{root}' have images of different size. Give --image-size N.")
    else:
        tree = Tree.below(root)
        classes = tree.classes
        train, test = _split_by_class(ImageFiles(tree, image_size), tree.labels)
    for split in (test, train):  # every file is read once, before anything rests on it
        found = _statistics(split.images)
    return Dataset("imagefolder", train, test, classes, *found, flip=True)


def _statistics(images: Tensor | ImageFiles) -> tuple[tuple[float, ...], tuple[float, ...]]:
    def computed() -> dict[str, Any]:
        return dict(zip(("mean", "std"), statistics(images.split(CHUNK)), strict=True))

    found = images.kept("statistics", computed, "reading all images") if isinstance(images, ImageFiles) else computed()
    return tuple(found["mean"]), tuple(found["std"])
