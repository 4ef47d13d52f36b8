"""Images in a tree of folders, one a class: listed at once, and read when they are wanted.

Of an image its name, its class and its place are held.  What is known only after all were read, such as their mean, is
kept in the user's cache, until a name, a size or a time in the tree changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fpq_analysis.errors import UserError
from fpq_analysis.files import SETTLED, read_json, reading, write_json
from fpq_analysis.progress import Progress

CHUNK = 256  # images that are read together
HELD = 2**30  # bytes of images that training holds; more are read anew in every epoch
MOST_WORKERS = 8
KINDS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CACHE = "FPQ_CACHE"  # names the folder of what is kept


@dataclass(frozen=True)
class Tree:
    """The files below `root/<class>/`, class by class, in the order of torchvision's `ImageFolder`.

    Attributes:
        names: of all files, relative to the root, one after the other; ends: (N,), where each ends.
        labels: (N,) int64.
        key: hash of names, sizes and times.
        settled: whether the latest time is so long ago that a later change would have another.
    """

    root: Path
    classes: tuple[str, ...]
    names: bytes
    ends: np.ndarray
    labels: Tensor
    key: str
    settled: bool

    @classmethod
    def below(cls, root: Path) -> Tree:
        """Raises `UserError` for what is no tree of two classes or more."""
        wanted = f"Expected {root}/<class>/<image>."
        with reading(root):
            classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not classes:
            raise UserError(f"'{root}' is not a tree of classes: there is no folder in it. {wanted}")
        begun, names = time.time(), bytearray()
        ends: list[int] = []
        counts: list[int] = []
        digest, newest = hashlib.sha256(), 0
        for name in classes:
            counts.append(len(ends))
            for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
                place = os.path.relpath(folder, root)
                for file in sorted(files):
                    if not file.lower().endswith(KINDS):
                        continue
                    path = os.fsencode(f"{place}/{file}")
                    size = changed = 0
                    with contextlib.suppress(OSError):  # a link to nothing: reading it will say so
                        stat = os.stat(f"{folder}/{file}")
                        size, changed = stat.st_size, stat.st_mtime_ns
                    digest.update(b"%d %d %d %s" % (len(path), size, changed, path))
                    newest = max(newest, changed)
                    names += path
                    ends.append(len(names))
            if counts[-1] == len(ends):
                raise UserError(f"'{root}' is not a tree of classes: there is no image in '{root / name}'. {wanted}")
        if len(classes) < 2:
            raise UserError(
                f"'{root}' has one class ('{classes[0]}'), and a classifier needs two or more. "
                "Is --data-root one level too deep, or too high?"
            )
        labels = torch.repeat_interleave(torch.tensor([*counts, len(ends)]).diff())
        found = bytes(names), np.array(ends, dtype=np.int64), labels
        return cls(root, tuple(classes), *found, digest.hexdigest(), begun - newest / 1e9 > SETTLED)

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, place: int) -> str:
        """Of one file."""
        start = self.ends[place - 1] if place else 0
        return os.path.join(self.root, os.fsdecode(self.names[start : self.ends[place]]))


class ImageFiles:
    """The images of a tree, or some of them, where a `Split` has its tensor.

    Args:
        image_size: side to which they are resized; None: as they are, all of one size.
        places: of some in the tree.

    Attributes:
        shape: (N, 3, H, W).
    """

    def __init__(self, tree: Tree, image_size: int | None = None, places: np.ndarray | None = None) -> None:
        self.tree = tree
        self._image_size = image_size
        self._places = np.arange(len(tree)) if places is None else places
        side = (image_size, image_size) if image_size is not None else self._first_size()
        self.shape = torch.Size((len(self), 3, *side))

    def __len__(self) -> int:
        return len(self._places)

    def some(self, which: Tensor) -> ImageFiles:
        """Those at these places, unread."""
        return ImageFiles(self.tree, self._image_size, self._places[which.numpy()])

    def __getitem__(self, which: Any) -> Tensor:
        """Those of a slice, or at these places, (B, 3, H, W) uint8; read by this process.

        Raises:
            UserError: if one cannot be read, or has another size.
        """
        places = self._places[which.numpy() if isinstance(which, Tensor) else which]
        found = torch.empty(len(places), *self.shape[2:], 3, dtype=torch.uint8)
        for row, place in zip(found.numpy(), places, strict=True):
            row[...] = self._read(self.tree.path(place))
        return found.permute(0, 3, 1, 2).contiguous()

    def read(self, places: Sequence[Tensor]) -> Iterator[Tensor]:
        """Batches of those at these places; other processes read ahead, where they can be forked.

        Raises:
            UserError: see `__getitem__`.
        """
        workers = min(MOST_WORKERS, torch.get_num_threads(), len(places) // 2)
        if sys.platform != "linux" or multiprocessing.current_process().daemon:
            workers = 0
        batches, sampler = cast(Any, _Batches(self)), cast(Any, map(Tensor.tolist, places))
        loader: DataLoader[Any] = DataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them in order, in batches."""
        return self.read(torch.arange(len(self)).split(size))

    def to(self, device: torch.device) -> Tensor | ImageFiles:
        """All of them as a tensor, where that takes no more than `HELD` bytes."""
        return self._whole.to(device) if self.shape.numel() <= HELD else self

    @cached_property
    def _whole(self) -> Tensor:
        return torch.cat(list(self.split(CHUNK)))

    def kept(self, about: str, compute: Callable[[], dict[str, Any]], what: str) -> dict[str, Any]:
        """What is computed from all of these images; from the cache, if it was so before.

        Args:
            about: names it.
            what: is being done, for those who wait.
        """
        from PIL import __version__ as reader

        words = (self.tree.key, self._image_size, hashlib.sha256(self._places.tobytes()).hexdigest(), reader, about)
        file = cache_folder() / "images" / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:32]}.json"
        with contextlib.suppress(UserError):
            if file.exists() and (there := read_json(file)).pop("about", None) == repr(words):
                return there
        with Progress(None, what):
            found = compute()
        if self.tree.settled:
            with contextlib.suppress(UserError):  # where nothing can be written, it is computed each time
                write_json(file, {"about": repr(words), **found})
        return found

    def _first_size(self) -> tuple[int, int]:
        height, width, _ = self._opened(self.tree.path(self._places[0])).shape
        return height, width

    def _read(self, path: str) -> np.ndarray:
        image = self._opened(path)
        if image.shape[:2] != self.shape[2:]:
            raise UserError(
                f"The images of '{self.tree.root}' differ in size ('{path}' is {image.shape[1]}x{image.shape[0]}, the "
                f"first is {self.shape[3]}x{self.shape[2]}). Give --image-size N to resize them."
            )
        return image

    def _opened(self, path: str) -> np.ndarray:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
                if self._image_size is not None:
                    picture = picture.resize((self._image_size, self._image_size), Image.Resampling.BILINEAR)
                return np.asarray(picture)
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"Cannot read the image '{path}': {error}. Remove or replace it.") from error


class _Batches:
    """Images by lists of places, for a `DataLoader`, which would put a worker's stack into a fault's words."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, places: list[int]) -> Tensor | UserError:
        try:
            return self.images[places]
        except UserError as error:
            return error


def cache_folder() -> Path:
    """Where to keep what can be computed anew: `$FPQ_CACHE`, or the user's cache."""
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "fpq_analysis"
