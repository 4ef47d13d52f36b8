"""Checkpoints that another program wrote: state dicts in files, and what the files do not say.

A folder of such files is a run, a file is an epoch.  Which network, which data and how its images were fed to it stand
in no state dict, so the user says it.  Files are tensors and plain values, or safetensors: nothing in them is run.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.batch import Batch
from fpq_analysis.choices import check_model_name
from fpq_analysis.data import OwnData, load_dataset, own_data, parse_normalization
from fpq_analysis.errors import UserError
from fpq_analysis.forward import ForwardFunction, with_forward
from fpq_analysis.models import MODELS
from fpq_analysis.quantizers import QuantSpec, in_eval_mode, quantize
from fpq_analysis.references import find
from fpq_analysis.runs import checkpoint as ckpt
from fpq_analysis.runs.checkpoint import Checkpoint
from fpq_analysis.runs.factories import factory_name, source_hash
from fpq_analysis.runs.networks import make_network, makes_quantized
from fpq_analysis.runs.run import SUFFIXES, Header, Run, find_runs, is_checkpoint, monitored_runs
from fpq_analysis.runs.source import OwnRuns
from fpq_analysis.runs.stamps import Stamp, check_same, known_stamp, remember
from fpq_analysis.runs.states import WRAPPERS, align, channels_of, find_state, read_content

AFTER_EPOCH = re.compile(r"(?<![a-z])ep(?:och)?[-_=. ]*(\d+)", re.IGNORECASE)
# Not a part of a decimal number, nor of a hash.
WHOLE_NUMBER = re.compile(r"(?<!\d)(?<!\d\.)\d+(?![\da-z]|\.\d)", re.IGNORECASE)


@dataclass(frozen=True)
class ForeignRuns(os.PathLike[str]):
    """A folder of another program's checkpoints, with what must be known to measure them.

    It stands for the folder wherever one is asked for: `measure(ForeignRuns("runs/own", make_net, "digits"), probe)`.
    Runs of ours below the folder are read as such.

    Every folder that holds files with an ending of `SUFFIXES` is a run.  The epoch is the number behind "epoch" in the
    file's name, or else the last whole number in it; files without one are left out, unless none has one: then they
    are counted in the order of their names, from 0.  A file that says another epoch itself is warned of.

    Attributes:
        folder: a run, or a folder of runs.
        model: a function that gives the network, itself or as `package.module:factory`, or a name of ours.  It is
            called with those of `num_classes` and `in_channels` that it takes.
        data: the training data: a name that `data.load_dataset` knows; or those of the user's own, see `data.OwnData`.
        data_root: where the data of a name lie.
        image_size: side to which images of these are resized (bilinear) before the network sees them.
        normalize: how pixels of these were normalised, see `data.parse_normalization`.
        quant: for a network quantized by `quantize`, with what.
        transform: for data of one's own, of a sample's inputs to what the network gets, a function or its name.
        forward: how the network is called, a function (model, inputs) to its outputs, or its name; None: see
            `forward.call`.
        drawn: number and seed of the samples that the fingerprint of data of one's own is of, see `on_sample`.

    Raises:
        UserError: if a name makes no sense, or the settings do not go together.
    """

    folder: str | Path
    model: str | Callable[..., nn.Module]
    data: Any = field(compare=False)  # tensors have no truth value; the fingerprint, in every header, decides
    data_root: str | None = None
    image_size: int | None = None
    normalize: str = "data"
    quant: QuantSpec | None = None
    transform: str | Callable[[Any], Any] | None = None
    forward: str | ForwardFunction | None = None
    drawn: tuple[int | None, int] = (1024, 0)

    def __post_init__(self) -> None:
        if isinstance(self.forward, str):
            find(self.forward, "forward function")
        if self._own is None and self.transform is not None:
            raise UserError(
                f"A transform is for data of your own; how images of '{self.data}' are prepared is said by "
                "image_size and normalize (--image-size, --normalize)."
            )
        if self._own is not None and (self.data_root, self.image_size, self.normalize) != (None, None, "data"):
            raise UserError(
                "data_root, image_size and normalize (--data-root, --image-size, --normalize) are for images of a "
                f"known data set. What '{self._own.name}' gives is prepared by itself, or by a transform (--transform)."
            )
        if isinstance(self.model, str):
            check_model_name(self.model)
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"The image size is {self.image_size}; it is the side of an image in pixels.")
        parse_normalization(self.normalize)

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def find_runs(self, folder: str | Path) -> list[Path]:
        """Every run at or below `folder`, sorted, ours among them.

        Raises:
            UserError: if there is none, or the data are not there.
        """
        runs = foreign_runs(folder)
        if not runs:
            return find_runs(folder, monitored=True)
        _ = self._images  # missing data are one error, not one a file
        return sorted({*runs, *monitored_runs(folder)})

    def on_sample(self, n_data: int | None, seed: int) -> ForeignRuns:
        """The same, for measuring on this sample."""
        return replace(self, drawn=(n_data, seed))

    def checkpoints(self, run: Path) -> dict[int, Path]:
        """Epoch to file for one run, in order of epochs; see `foreign_epochs`."""
        return foreign_epochs(run)

    def header(self, path: Path) -> Header:
        """What can be known of a file without its weights; these are read only once.

        Raises:
            UserError: see `read_checkpoint`.
        """
        if _is_our_run(path.parent):
            return OwnRuns().header(path)
        stamp = known_stamp(path) if path.is_file() else None
        if stamp is None or stamp.channels is None:
            return self.read_checkpoint(path).header
        return self._describe(path, {}, stamp.sha256, stamp.channels).header

    def read_checkpoint(self, path: str | Path) -> Checkpoint:
        """Read one file, of another program or ours.

        Raises:
            UserError: if it is missing, damaged, holds code or no state dict.
        """
        path = Path(path)
        if _is_our_run(path.parent):
            return ckpt.read_checkpoint(path)
        if not path.is_file():
            raise UserError(f"No checkpoint '{path}'.")
        stamp = Stamp.of(path)
        content = read_content(path)
        check_same(path, stamp)
        if ckpt.is_ours(content):
            self._compare_epochs(path, content)
            return replace(ckpt.read_checkpoint(path), epoch=_epoch_among(path))
        state, _ = find_state(content)
        if not state:
            held = ", ".join(map(repr, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
            raise UserError(
                f"'{path}' holds no state dict, alone or under one of {', '.join(WRAPPERS)}: it holds "
                f"{held[:200] or 'nothing'}. Save model.state_dict(), or move the file out of the folder."
            )
        ckpt.check_tensors(state, path)
        self._compare_epochs(path, content)
        channels = channels_of(state)
        remember(path, replace(stamp, channels=channels))
        return self._describe(path, state, stamp.sha256, channels)

    @staticmethod
    def _compare_epochs(path: Path, content: Any) -> None:
        """Warn if the file says another epoch than its name, which counts."""
        inside, named = content.get("epoch"), _epoch(path)
        if type(inside) is int and named is not None and inside != named:
            warnings.warn(
                f"'{path}' says that it is of epoch {inside}, and its name that it is of {named}. The name counts. "
                "Some programs write the next epoch's number; if the file was renamed, give it its own name.",
                stacklevel=3,
            )

    def _describe(self, path: Path, state: dict[str, Tensor], digest: str, channels: int) -> ForeignCheckpoint:
        images = self._images.get(channels) or next(iter(self._images.values()))
        return ForeignCheckpoint(
            epoch=_epoch_among(path),
            model={"name": self._name, "num_classes": images["num_classes"], "in_channels": images["channels"]},
            quant=asdict(self.quant) if self.quant else None,
            data=images,
            run={
                "method": self.quant.scheme if self.quant else "fp",
                "seed": None,
                "init": None,
                "data": images["name"],
                "data_root": self.data_root,
                "image_size": self.image_size,
                "feed": self._feed(images["channels"]),
            },
            state_dict=state,
            sha256=digest,
            path=path,
            factory=self.model,
            own=self._own,
            function=find(self.forward, "forward function") if isinstance(self.forward, str) else self.forward,
        )

    @property
    def _name(self) -> str:
        return self.model if isinstance(self.model, str) else factory_name(self.model)

    def _feed(self, channels: int) -> dict[str, Any]:
        return {"image_size": self.image_size, "channels": channels, "normalize": self.normalize}

    @cached_property
    def _own(self) -> OwnData | None:
        return own_data(self.data, self.transform)

    @cached_property
    def _images(self) -> dict[int, dict[str, Any]]:
        """What the data set is, by the number of channels that it can have: grey images can be repeated to three."""
        if self._own is not None:
            found = self._own.describe(*self.drawn)
            if self.model not in MODELS and not found["classes"]:  # what the samples show may not be all there is
                found |= {"num_classes": None, "channels": None}
            return {0: found}
        data = load_dataset(self.data, self.data_root, image_size=self.image_size)
        means, _ = parse_normalization(self.normalize) or ((0.0,), ())
        possible = [1, 3] if data.channels == 1 else [data.channels]
        fitting = [n for n in possible if len(means) in (1, n)]
        about = {n: data.prepared(**self._feed(n)).describe() for n in fitting or possible}
        return {n: {**found, "num_classes": len(found["classes"])} for n, found in about.items()}


@dataclass(frozen=True)
class ForeignCheckpoint(Checkpoint):
    """A state dict, and what the user said of it.

    Attributes:
        path: the file.
        factory: see `ForeignRuns.model`.
        own: data of the user's own.
        function: see `ForeignRuns.forward`.
    """

    path: Path
    factory: str | Callable[..., nn.Module]
    own: OwnData | None = None
    function: ForwardFunction | None = None

    @property
    def header(self) -> Header:
        stated: dict[str, Any] = {"model": self.model, "quant": self.quant}
        if self.own is not None:
            stated["data_name"] = self.data["name"]
        if self.function is not None:
            stated["forward"] = {factory_name(self.function): source_hash(self.function)}
        quantized = self.quant is not None or makes_quantized(self.factory, **self.model)
        return replace(super().header, model=self.factory, stated=stated, quantized=quantized)

    def build(self, model: str | None = None) -> nn.Module:
        """The model, in eval mode on the CPU, with this state; names of tensors may have a prefix in the file.

        Raises:
            UserError: if the state does not fit the model, or holds NaN or infinity.
        """
        name, classes, channels = self.model["name"], self.model["num_classes"], self.model["in_channels"]
        net = make_network(self.factory, name, classes, channels)
        if self.quant is not None:
            net = quantize(net, QuantSpec(**{**self.quant, "weight_calibration": "minmax"}))
        state = align(self.state_dict, net.state_dict(), self.path)
        ckpt.load_state(net, state, what=f"'{name}'", whose=f"'{self.path}'", cure=self._cure())
        return in_eval_mode(net)

    def callable(self, net: nn.Module) -> nn.Module:
        """See `Checkpoint`."""
        return with_forward(net, self.function)

    def sample(self, n_data: int | None, seed: int, data_root: str | None = None) -> Batch | list[Batch]:
        """See `Checkpoint`."""
        return super().sample(n_data, seed, data_root) if self.own is None else self.own.sample(n_data, seed).batches

    def _cure(self) -> str:
        if self.quant is None and any(".parametrizations." in key for key in self.state_dict):
            return "The file is of a quantized network; for one of fpq_analysis.quantize say its widths: --bits W4A4."
        classes = f"{self.model['num_classes']} classes, as many as the data set '{self.data['name']}' has"
        cure = "Give the function that made it, as --model package.module:factory"
        return f"{cure}; here it was to give {classes}." if self.model["num_classes"] else f"{cure}."

    def check_runs(self, net: nn.Module, images: Any) -> None:
        """Raise `UserError` unless `net` gives logits for an image of a known data set."""
        if self.own is not None:
            return
        shape = " x ".join(map(str, images.shape[1:]))
        try:
            with torch.no_grad():
                logits = net(images[:1])
        except UserError:
            raise
        except Exception as error:  # the user's code: anything can happen
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise UserError(
                f"The network '{self.model['name']}' fails on an image of '{self.data['name']}', {shape} (channels x "
                f"height x width): {type(error).__name__}: {reason}. If it was trained on images of another size, say "
                "so: --image-size N."
            ) from error
        classes = len(self.data["classes"])
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < classes:
            raise UserError(
                f"The network '{self.model['name']}' gives {found} for one image, and a logit for each of the "
                f"{classes} classes is wanted: (1, {classes}). Give a factory whose network returns these alone."
            )


def foreign_files(run: Path) -> list[Path]:
    """Files of this folder that can be checkpoints, by name."""
    return sorted(path for path in run.iterdir() if is_checkpoint(path))


def foreign_runs(folder: str | Path) -> list[Path]:
    """Every folder at or below `folder` that holds checkpoint files of any program, sorted."""
    return sorted({path.parent for path in Path(folder).rglob("*") if is_checkpoint(path)})


def foreign_epochs(run: Path) -> dict[int, Path]:
    """Epoch to file for one run, in order of epochs, as `ForeignRuns` says; for a run of ours, its own.

    Raises:
        UserError: if two files are of one epoch, or a run of ours has files of another program.
    """
    files = foreign_files(run)
    if _is_our_run(run):
        ours = Run(run).checkpoints
        # Beside its checkpoints a run of ours has `resume.pt`, and what `fpq-analyze export` made of them.
        others = [p for p in files if p not in ours.values() and p.name != "resume.pt" and p.suffix != ".safetensors"]
        if others:
            raise UserError(
                f"'{run}' is a run of fpq-analyze and holds a checkpoint of another program too ('{others[0].name}'). "
                "Move that into a folder of its own."
            )
        return ours
    numbered = [(_epoch(path), path) for path in files]
    if all(epoch is None for epoch, _ in numbered):
        return dict(enumerate(files))
    found: dict[int, Path] = {}
    for epoch, path in sorted((epoch, path) for epoch, path in numbered if epoch is not None):
        if epoch in found:
            raise UserError(
                f"'{found[epoch].name}' and '{path.name}' in '{run}' are both of epoch {epoch}, by their names. Keep "
                "one of them there, or name them epoch_N.pth with different N."
            )
        found[epoch] = path
    return found


def _epoch_among(path: Path) -> int:
    """The epoch of a file among those of its folder; 0 of one that is left out there."""
    return next((epoch for epoch, file in foreign_epochs(path.parent).items() if file == path), 0)


def left_out(run: Path) -> list[Path]:
    """Files that have no number in their name, in a run where others have one."""
    used = set(foreign_epochs(run).values())
    return [] if _is_our_run(run) else [path for path in foreign_files(run) if path not in used]


def _is_our_run(run: Path) -> bool:
    return (run / "run.json").exists() or (run / "manifest.json").exists()


def _epoch(path: Path) -> int | None:
    """The number behind "epoch" in the file's name, or else its last whole number."""
    end = next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(suffix))
    stem = path.name[: -len(end)]
    found = AFTER_EPOCH.findall(stem) or WHOLE_NUMBER.findall(stem)
    return int(found[-1]) if found else None
