"""Data of the user's own: a function that gives them, a file, a folder, or Python objects."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fpq_analysis.batch import FORMS, TARGETS, Batch
from fpq_analysis.choices import DATASETS
from fpq_analysis.data.draw import HEAD, as_read, draw, fingerprint
from fpq_analysis.errors import UserError
from fpq_analysis.nests import size
from fpq_analysis.references import find, where

NPZ = ".npz"
INPUTS = ("x", "images", "inputs", "data")  # arrays of a file that are handed over alone, not by their name
OF_DATASETS = ("dataset_dict.json", "dataset_info.json")  # in a folder that Hugging Face's `save_to_disk` made
KEPT = 4  # samples


@dataclass(frozen=True)
class Sample:
    """What is measured on.

    Attributes:
        batches: a pair (inputs, targets); a list of such where samples are of several shapes.
        fingerprint: hash of all values.
        classes: their names, if the data say so.
        n_classes: one more than the highest class number; 0 for other targets.
        n_data: samples.
    """

    batches: Batch | list[Batch]
    fingerprint: str
    classes: tuple[str, ...] | None
    n_classes: int
    n_data: int


@dataclass(frozen=True, eq=False)
class OwnData:
    """Data by a name, or as they are, from which samples are drawn.

    Attributes:
        given: `package.module:function`, `file.npz`, the folder of a Hugging Face data set; or a function that gives
            data, or data: a map-style data set, an iterable of batches, or one batch (see `batch.FORMS`).
        transform: of one sample's inputs to what the network gets, a function or its name.
    """

    given: Any
    transform: str | Callable[[Any], Any] | None = None

    @property
    def name(self) -> str:
        """For tables and figures."""
        given = self.given
        if isinstance(given, (str, Path)):
            return Path(given).name if Path(given).exists() else str(given)
        if isinstance(given, (tuple, list, Mapping)):
            return "tensors"
        named = given if hasattr(given, "__qualname__") else type(given)
        return f"{named.__module__}:{named.__qualname__}" if callable(given) else type(given).__name__

    def sample(self, n_data: int | None, seed: int) -> Sample:
        """`n_data` samples (None: all), drawn by `seed`, or the first ones of what has no places; kept for a while.

        Raises:
            UserError: if the data are not there, are no data, or are others each time.
        """
        hashable = [given if isinstance(given, str) else id(given) for given in (self.given, self.transform)]
        key = (*hashable, n_data, seed)
        if key not in _kept:
            for old in list(_kept)[: -KEPT + 1]:
                del _kept[old]
            _kept[key] = self, self._sample(n_data, seed)
        return _kept[key][1]

    def describe(self, n_data: int | None, seed: int) -> dict[str, Any]:
        """What a record says of the data, in the form of `Dataset.describe`."""
        found = self.sample(n_data, seed)
        inputs, _ = found.batches if isinstance(found.batches, tuple) else found.batches[0]
        images = isinstance(inputs, Tensor) and inputs.ndim == 4
        return {
            "name": self.name,
            "classes": list(found.classes or ()),
            "num_classes": len(found.classes or ()) or found.n_classes or None,
            "channels": inputs.shape[1] if images else None,
            "n_train": found.n_data,
            "fingerprint": found.fingerprint,
        }

    def _sample(self, n_data: int | None, seed: int) -> Sample:
        transform = find(self.transform, "transform") if isinstance(self.transform, str) else self.transform

        def read(n: int | None, turn: int) -> tuple[list[Batch], Any]:
            # Random numbers that are drawn in reading are others each turn.
            with as_read(turn):
                data = self._open()
                return draw(data, n, seed, transform, self.name), data

        batches, data = read(n_data, 0)
        few = HEAD if n_data is None else min(HEAD, n_data)
        if not (hasattr(data, "__next__") and data is self.given):  # which can be gone through once
            heads = [fingerprint(read(few, turn)[0]) for turn in (1, 2)]
            if heads[0] != heads[1]:
                raise UserError(
                    f"The data '{self.name}' are others each time they are read: is there augmentation, a shuffle or a "
                    "random split in them? Measure on fixed samples, without augmentation, and let random numbers come "
                    "from a generator of their own: torch.Generator().manual_seed(0)."
                )
        classes = getattr(data, "classes", None)
        named = tuple(map(str, classes)) if isinstance(classes, (list, tuple)) and classes else None
        targets = [y for _, y in batches if not isinstance(y, (tuple, list, dict)) and not y.is_floating_point()]
        highest = max((int(y.max()) + 1 for y in targets), default=0)
        whole = batches[0] if len(batches) == 1 else batches
        return Sample(whole, fingerprint(batches), named, highest, sum(map(size, batches)))

    def _open(self) -> Any:
        given = self.given
        if isinstance(given, (str, Path)):
            if str(given).endswith(NPZ):
                return _arrays(Path(given))
            if is_saved(given):
                return _saved(Path(given))
            given = find(str(given), "data")
        makes = isinstance(given, type) or not (hasattr(given, "__getitem__") or hasattr(given, "__iter__"))
        if not callable(given) or not makes:
            return given
        try:
            data = given()
        except (Exception, SystemExit) as error:  # the user's code: anything can happen
            raise UserError(
                f"'{self.name}' failed: {type(error).__name__}: {error}{where(error)}. It is called without arguments, "
                "and must give the training data."
            ) from error
        if data is None:
            raise UserError(f"'{self.name}' gave nothing; does its return statement miss? {FORMS}")
        return data


_kept: dict[tuple[Any, ...], tuple[OwnData, Sample]] = {}


def forget() -> None:
    """Let go of the samples that are kept."""
    _kept.clear()


def own_data(data: Any, transform: str | Callable[[Any], Any] | None = None) -> OwnData | None:
    """Data of the user's own; None for the name of one of `DATASETS`, or what might be meant for one."""
    if isinstance(data, str) and (data in DATASETS or not (":" in data or data.endswith(NPZ) or is_saved(data))):
        return None
    return OwnData(data, transform)


def is_saved(folder: str | Path) -> bool:
    """Whether Hugging Face's `save_to_disk` made this folder."""
    return any((Path(folder) / name).is_file() for name in OF_DATASETS)


def _arrays(path: Path) -> Any:
    form = f"It is to hold arrays, as written by numpy.savez('{path.name}', x=..., y=...)."
    try:
        if path.is_file() and not zipfile.is_zipfile(path):  # NumPy would look for something else in it
            raise UserError(f"'{path}' is no archive of arrays, or only a part of one. {form}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"No file '{path}'.") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' cannot be read: {error}. {form}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise UserError(f"'{name}' in '{path}' is no array. {form}")
    targets = [name for name in ("y", *TARGETS) if name in arrays]
    if len(targets) != 1 or len(arrays) < 2:
        raise UserError(
            f"'{path}' holds the arrays {', '.join(arrays) or 'none'}, and wants inputs ({', '.join(INPUTS)}, or any "
            f"name that the network's forward has) and targets (y, {', '.join(TARGETS)})."
        )
    (target,) = targets
    inputs = {name: array for name, array in arrays.items() if name != target}
    alone = len(inputs) == 1 and next(iter(inputs)) in INPUTS
    return (next(iter(inputs.values())) if alone else inputs), arrays[target]


def _saved(folder: Path) -> Any:
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise UserError(f"'{folder}' needs Hugging Face's datasets to be read: pip install datasets") from error
    try:
        found: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # of arrow, of the file system, ...
        raise UserError(f"'{folder}' cannot be read: {type(error).__name__}: {error}") from error
    if isinstance(found, dict):
        if "train" not in found and len(found) != 1:
            raise UserError(f"'{folder}' has the splits {', '.join(found)}; name the folder of one: {folder}/SPLIT")
        found = found["train"] if "train" in found else next(iter(found.values()))
    return found
