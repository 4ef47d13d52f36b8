"""Checkpoints that another program wrote: state dicts in files, and what the files do not say.

A folder of such files is a run, a file is an epoch.  Which network, which data and how its images were fed to it stand
in no state dict, so the user says it.  Files are tensors and plain values, or safetensors: nothing in them is run.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpq_analysis.data import load_dataset, parse_normalization
from fpq_analysis.errors import UserError
from fpq_analysis.models import build_model, call_factory, check_model_name
from fpq_analysis.quantizers import QuantSpec, quantize
from fpq_analysis.runs import checkpoint as ckpt
from fpq_analysis.runs.checkpoint import COUNTER, Checkpoint
from fpq_analysis.runs.factories import factory_name
from fpq_analysis.runs.run import Header, Run, find_runs, monitored_runs
from fpq_analysis.runs.source import OwnRuns
from fpq_analysis.runs.stamps import Stamp, check_same, known_stamp, remember

SUFFIXES = (".pt", ".pth", ".pt.tar", ".pth.tar", ".ckpt", ".safetensors")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")  # under which a state dict is kept
# What torch.compile, FSDP and activation checkpointing put into the names of tensors.
WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
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
        data: the training data, see `data.load_dataset`.
        data_root: where these lie.
        image_size: side to which images are resized (bilinear) before the network sees them.
        normalize: how pixels were normalised, see `data.parse_normalization`.
        quant: for a network quantized by `quantize`, with what.

    Raises:
        UserError: if the name of the model or the normalisation makes no sense.
    """

    folder: str | Path
    model: str | Callable[..., nn.Module]
    data: str
    data_root: str | None = None
    image_size: int | None = None
    normalize: str = "data"
    quant: QuantSpec | None = None

    def __post_init__(self) -> None:
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
        channels = _channels(state)
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
            model={"name": self._name, "num_classes": len(images["classes"]), "in_channels": images["channels"]},
            quant=asdict(self.quant) if self.quant else None,
            data=images,
            run={
                "method": self.quant.scheme if self.quant else "fp",
                "seed": None,
                "init": None,
                "data": self.data,
                "data_root": self.data_root,
                "image_size": self.image_size,
                "feed": self._feed(images["channels"]),
            },
            state_dict=state,
            sha256=digest,
            path=path,
            factory=self.model,
        )

    @property
    def _name(self) -> str:
        return self.model if isinstance(self.model, str) else factory_name(self.model)

    def _feed(self, channels: int) -> dict[str, Any]:
        return {"image_size": self.image_size, "channels": channels, "normalize": self.normalize}

    @cached_property
    def _images(self) -> dict[int, dict[str, Any]]:
        """What the data set is, by the number of channels that it can have: grey images can be repeated to three."""
        data = load_dataset(self.data, self.data_root, image_size=self.image_size)
        means, _ = parse_normalization(self.normalize) or ((0.0,), ())
        possible = [1, 3] if data.channels == 1 else [data.channels]
        fitting = [n for n in possible if len(means) in (1, n)]
        return {n: data.prepared(**self._feed(n)).describe() for n in fitting or possible}


@dataclass(frozen=True)
class ForeignCheckpoint(Checkpoint):
    """A state dict, and what the user said of it.

    Attributes:
        path: the file.
        factory: see `ForeignRuns.model`.
    """

    path: Path
    factory: str | Callable[..., nn.Module]

    @property
    def header(self) -> Header:
        stated = {"model": self.model, "quant": self.quant}
        return replace(super().header, model=self.factory, stated=stated)

    def build(self, model: str | None = None) -> nn.Module:
        """The model, in eval mode on the CPU, with this state; names of tensors may have a prefix in the file.

        Raises:
            UserError: if the state does not fit the model, or holds NaN or infinity.
        """
        name, classes, channels = self.model["name"], self.model["num_classes"], self.model["in_channels"]
        if callable(self.factory):
            net = call_factory(self.factory, name, classes, channels)
        else:
            net = build_model(self.factory, classes, channels)
        if self.quant is not None:
            net = quantize(net, QuantSpec(**{**self.quant, "weight_calibration": "minmax"}))
        state = align(self.state_dict, net.state_dict(), self.path)
        ckpt.load_state(net, state, what=f"'{name}'", whose=f"'{self.path}'", cure=self._cure())
        return net.eval()

    def _cure(self) -> str:
        if self.quant is None and any(".parametrizations." in key for key in self.state_dict):
            return "The file is of a quantized network; for one of fpq_analysis.quantize say its widths: --bits W4A4."
        return (
            f"Give the function that made it, as --model package.module:factory; here it was to give "
            f"{self.model['num_classes']} classes, as many as the data set '{self.data['name']}' has."
        )

    def check_runs(self, net: nn.Module, images: Tensor) -> None:
        """Raise `UserError` unless `net` gives logits for an image of the data set."""
        shape = " x ".join(map(str, images.shape[1:]))
        try:
            with torch.no_grad():
                logits = net(images[:1])
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
    return sorted(path for path in run.iterdir() if _is_checkpoint(path))


def foreign_runs(folder: str | Path) -> list[Path]:
    """Every folder at or below `folder` that holds checkpoint files of any program, sorted."""
    return sorted({path.parent for path in Path(folder).rglob("*") if _is_checkpoint(path)})


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


def _is_checkpoint(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def _is_our_run(run: Path) -> bool:
    return (run / "run.json").exists() or (run / "manifest.json").exists()


def _epoch(path: Path) -> int | None:
    """The number behind "epoch" in the file's name, or else its last whole number."""
    end = next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(suffix))
    stem = path.name[: -len(end)]
    found = AFTER_EPOCH.findall(stem) or WHOLE_NUMBER.findall(stem)
    return int(found[-1]) if found else None


def read_content(path: Path) -> Any:
    """What a file of tensors and plain values holds; of a safetensors file, its tensors.

    Raises:
        UserError: if it is missing, damaged, or holds code; or safetensors is not installed.
    """
    if path.suffix != ".safetensors":
        return ckpt.load_tensors(path)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"'{path}' needs safetensors to be read ({error}). Install it: pip install 'fpq-analysis[export]'"
        ) from error
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"No checkpoint '{path}'.") from error
    except SafetensorError as error:
        raise UserError(
            f"'{path}' cannot be read: it is cut short or damaged ({error}). Copy it again from its source."
        ) from error


def find_state(content: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in what a program saved, and the keys under which it was; ({}, ()) if there is none."""
    if not isinstance(content, dict) or not content:
        return {}, ()
    if all(isinstance(value, Tensor) for value in content.values()):
        return dict(content), ()
    for key in WRAPPERS:
        state, keys = find_state(content.get(key))
        if state:
            return state, (key, *keys)
    return {}, ()


def align(state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` under the names that the model's `own` state has.

    Removed are what `torch.compile` and FSDP put into names, and what stands before all names (`module.` of
    DataParallel, `model.` or `net.` of a LightningModule, whose further tensors are then left behind).  Counters of
    batches that an old file lacks are taken from `own`.

    Raises:
        UserError: if several prefixes fit.
    """
    state = {WRAPPED.sub("", key): value for key, value in state.items()}
    wanted = [key for key in own if not key.endswith(COUNTER)]
    fits = {prefix: sum(prefix + key in state for key in wanted) for prefix in _prefixes(state, wanted)}
    best = [prefix for prefix, number in fits.items() if number == max(fits.values())]
    if len(best) > 1 and "" not in best and fits[best[0]] == len(wanted):
        raise UserError(
            f"'{path}' holds several networks of this form, under {' and '.join(map(repr, best))}, and which one is "
            "meant is not known. Save the state_dict() of one alone."
        )
    prefix = "" if not best or "" in best else best[0]
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    counters = {key: value for key, value in own.items() if key.endswith(COUNTER)}
    return counters | found


def _prefixes(state: dict[str, Tensor], wanted: list[str]) -> Iterator[str]:
    """What may stand before all the names in `wanted`: "", and whatever stands before the first that occurs."""
    yield ""
    for key in wanted:
        found = [name.removesuffix(key) for name in state if name.endswith(f".{key}")]
        if found:
            yield from found
            return


def _channels(state: dict[str, Tensor]) -> int:
    """Channels of the images that the network takes, by its first convolution; 0 for a network without one."""
    return next((t.shape[1] for t in state.values() if t.ndim == 4), 0)
