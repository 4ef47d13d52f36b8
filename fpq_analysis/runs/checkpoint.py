"""The content of checkpoint files: tensors and primitives only (the folder they lie in: `run.py`).

Every file is replaced in one step or appended to, so a kill at any moment leaves the last good checkpoint readable.
Files are loaded with `weights_only=True`: code inside a checkpoint is never run.
"""

from __future__ import annotations

import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpq_analysis.batch import Batch
from fpq_analysis.data import load_run_data, training_sample
from fpq_analysis.errors import UnfitError, UserError, naming
from fpq_analysis.files import atomic_write, bad_member, reading
from fpq_analysis.models import build_model
from fpq_analysis.quantizers import QuantSpec, other_quantizers, quantize
from fpq_analysis.runs.run import CHECKPOINT_NAME, FOREIGN_OPTIONS, Header
from fpq_analysis.runs.stamps import Stamp, check_manifest, check_same, read_stamps, write_stamps
from fpq_analysis.schema import CheckpointFile, check
from fpq_analysis.text import counted

FORMAT = 1
MEASURED = "float32"
COUNTER = "num_batches_tracked"  # of BatchNorm, not in files older than PyTorch 0.4.1, and unused in eval mode
MOST_SHARED = 4  # how often tensors may share memory: tied weights twice, say


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds.

    Attributes:
        epoch: number of finished epochs; 0 is before training.
        model: `name`, `num_classes`, `in_channels` of the float network.
        quant: fields of a `QuantSpec`, or None for a float network.
        data: name, classes and normalisation of the training data.
        run: the run's config.
        state_dict: weights, buffers and the state of the quantizers.
        sha256: of the file.
    """

    epoch: int
    model: dict[str, Any]
    quant: dict[str, Any] | None
    data: dict[str, Any]
    run: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    sha256: str

    @property
    def header(self) -> Header:
        """What can be known of it without its weights."""
        quantized, init = self.quant is not None, self.run.get("init")
        return Header(self.epoch, self.sha256, self.model["name"], self.data["fingerprint"], quantized, init)

    @property
    def dtype(self) -> str:
        """Of the weights in the file and, where that is not float32, the type they are measured in."""
        kinds = sorted({str(t.dtype).removeprefix("torch.") for t in self.state_dict.values() if t.is_floating_point()})
        return MEASURED if kinds in ([], [MEASURED]) else f"{' and '.join(kinds)}, measured in {MEASURED}"

    def sample(self, n_data: int | None, seed: int, data_root: str | None = None) -> Batch | list[Batch]:
        """Samples of its training data, drawn by `seed`, to measure on.

        Args:
            n_data: how many; None for all.
            data_root: where the data lie, if not where they were.

        Raises:
            UserError: if they are missing, or are not those it was trained on.
        """
        root = data_root or self.run["data_root"]
        data = load_run_data(self.run, root)
        if data.fingerprint != self.data["fingerprint"]:
            raise UnfitError(
                f"The data in '{root or data.name}' are not those the checkpoint was trained on ({len(data.train)} "
                f"training images in {data.num_classes} classes here, {self.data['n_train']} in "
                f"{len(self.data['classes'])} then, or other pixels).",
                "Point --data-root at the data set of the training run.",
            )
        return training_sample(data, n_data or len(data.train), seed)

    def callable(self, net: nn.Module) -> nn.Module:
        """The network as measurements call it: with the inputs of a batch alone."""
        return net

    def build(self, model: str | None = None) -> nn.Module:
        """The model, in eval mode on the CPU, with this checkpoint's state.

        Args:
            model: name or `package.module:factory` to use in place of the one the file names.

        Raises:
            UserError: if the state does not fit the model, or holds NaN or infinity.
        """
        name = model or self.model["name"]
        net = build_model(name, self.model["num_classes"], self.model["in_channels"], allow_import=model is not None)
        if self.quant is not None:
            # The state brings its own scales; the cheap calibration only makes the tensors exist.
            spec = QuantSpec(**{**self.quant, "weight_calibration": "minmax"})
            net = quantize(net, spec)
        load_state(net, self.state_dict, what=f"'{name}'", whose=made_with(self.model["name"]))
        return net.eval()


FIELDS = tuple(field for field in Checkpoint.__dataclass_fields__ if field != "sha256")  # in the file
ANOTHER_MODEL = "Give the model it was trained as: --model NAME, or leave --model out to use the one the file names."


def made_with(model: str) -> str:
    """How `load_state` calls a checkpoint of ours."""
    return f"The checkpoint was made with '{model}' and"


def load_state(
    model: nn.Module, state: dict[str, torch.Tensor], *, what: str, whose: str, cure: str = ANOTHER_MODEL
) -> None:
    """Load `state` into `model`, or raise a `UserError` that names both and the first difference.

    What belongs to other programs' quantizers is left to these: their tensors get shapes, or come to be, by loading.

    Args:
        what: the model's name; whose: the state's, as the beginning of a sentence.
        cure: what to do if they do not fit.
    """
    theirs = tuple(f"{name}." for name, _, _ in other_quantizers(model))
    left = {key: value for key, value in state.items() if key.startswith(theirs)}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(theirs)}
    state = {key: value for key, value in state.items() if key not in left}
    missing = [key for key in own if key not in state]
    surplus = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or surplus or reshaped:
        if reshaped:
            key = reshaped[0]
            example = f"'{key}' is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        else:
            example = f"'{missing[0]}' is not in the file" if missing else f"'{surplus[0]}' is not in the model"
        kinds = {"of another shape": reshaped, "missing": missing, "unknown": surplus}
        counts = [f"{counted(len(keys), 'tensor')} {kind}" for kind, keys in kinds.items() if keys]
        raise UserError(f"{whose} does not fit the model {what}: {', '.join(counts)} (for example, {example}). {cure}")
    other = [key for key in own if _kind(state[key]) != _kind(own[key]) and not key.endswith(COUNTER)]
    if other:
        key = other[0]
        raise UserError(
            f"{whose} stores '{key}' as {_name(state[key])}, and the model {what} has {_name(own[key])} there "
            f"({len(other)} tensors so). Whole numbers are most likely codes of a packed or quantized export, which "
            "mean nothing without the scales and the rule they go with. Save the state_dict() of the network in "
            "floating point, before it is converted."
        )
    state = {key: value.to(own[key].dtype) for key, value in state.items()}
    bad = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise UserError(
            f"The checkpoint holds NaN or infinity in {len(bad)} of {len(state)} tensors (first: '{bad[0]}'), so "
            "nothing measured on it would mean anything. The training diverged; use an earlier epoch, or train again "
            "with a smaller --lr."
        )
    try:
        model.load_state_dict(state | left)
    except RuntimeError as error:
        raise UserError(f"{whose} does not fit the model {what}: {error}. {cure}") from error


def _kind(tensor: torch.Tensor) -> str:
    """What a cast would not keep: a step between these, or from a floating point number, is no rounding."""
    return "floating point" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def save_checkpoint(run: Path, checkpoint: dict[str, Any]) -> Path:
    """Write `<run>/epoch_NNNN.pt` and enter its hash in the manifest.

    Args:
        checkpoint: the fields of `Checkpoint` but `sha256`.
    """
    path = run / f"epoch_{checkpoint['epoch']:04d}.pt"
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **checkpoint}, file))
    manifest = run / "manifest.json"
    write_stamps(manifest, {**read_stamps(manifest), path.name: Stamp.of(path)})
    return path


def load_tensors(path: Path, *, known: bool = False) -> Any:
    """`torch.load` on the CPU, tensors and primitives only.

    Args:
        known: whether the file is known to be as it was written; else the archive's own checksums are compared, which
            torch does not do.

    Raises:
        UserError: if the file is not there, is damaged, or wants to run code.
    """
    if not path.is_file():
        raise UserError(f"No checkpoint '{path}'.")
    with reading(path):
        path.open("rb").close()
    try:
        check_stored(path)
        bad = None if known else bad_member(path)
        if bad is None:
            with warnings.catch_warnings(action="ignore"):  # torch's, on the file's form
                return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        # torch raises UnpicklingError, RuntimeError, EOFError, ... for damage, and UnpicklingError for code.
        if "GLOBAL" in str(error):  # a name to import, which tensors and plain values do not need
            raise UserError(
                f"'{path}' holds more than tensors and plain values and would have to run code to load. Nothing was "
                "run. If you trust its maker, save its state_dict() alone and use that."
            ) from error
        raise UserError(
            f"'{path}' cannot be read: it is cut short or damaged ({type(error).__name__}). Copy it again "
            "from its source, or train the run anew with --overwrite."
        ) from error
    raise UserError(
        f"'{path}' is damaged: its part '{bad}' has not the checksum that the archive holds of it. Copy it again from "
        "its source, or train the run anew with --overwrite."
    )


def check_stored(path: Path) -> None:
    """Raise `UserError` for an archive that holds a program, or is larger in memory than on the disk.

    `torch.save` packs nothing; `torch.jit.save` does.  A damaged archive is left to who reads it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise UserError(
            f"'{path}' is a TorchScript archive (torch.jit.save), which holds a program. Nothing was run. If you "
            "trust its maker, save its state_dict() alone: torch.save(torch.jit.load(FILE).state_dict(), ...)."
        )
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise UserError(
            f"'{path}' is a compressed archive, which torch.save never makes, and could fill the memory. Unpack it, or "
            "save the state_dict() again."
        )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify one checkpoint file.

    Raises:
        UserError: if it is missing, damaged, differs from the manifest's hash, holds code, is not one of ours, or is of
            another epoch than its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No checkpoint '{path}'.")
    stamp = Stamp.of(path)
    content = load_tensors(path, known=check_manifest(path, stamp.sha256))
    check_same(path, stamp)
    if not is_ours(content):
        raise UserError(
            f"'{path}' is not a checkpoint written by fpq-analyze. To measure it, say what network it is of and which "
            f"data that was trained on: {FOREIGN_OPTIONS}; or call fpq_analysis.hessian_trace(model, batches) from "
            "Python."
        )
    if content.get("format") != FORMAT:
        raise UserError(f"'{path}' has format {content.get('format')}, and this version reads format {FORMAT}.")
    check(CheckpointFile, content, f"'{path}'")
    _check_sizes(content, path)
    check_tensors(content["state_dict"], path)
    named = CHECKPOINT_NAME.fullmatch(path.name)
    if named and int(named[1]) != content["epoch"]:
        raise UserError(
            f"'{path}' is of epoch {content['epoch']}, by what it holds, and of epoch {int(named[1])} by its name. It "
            "was copied or renamed; give it its own name again, or remove it."
        )
    return Checkpoint(**{field: content[field] for field in FIELDS}, sha256=stamp.sha256)


def _check_sizes(content: dict[str, Any], path: Path) -> None:
    """Raise `UserError` if the network's ends are not the data's: it would be built as large as the file says."""
    model, data = content["model"], content["data"]
    ends = {"num_classes": len(data["classes"]), "in_channels": data["channels"]}
    for field, wanted in ends.items():
        if model[field] != wanted:
            raise UserError(
                f"'{path}' is damaged: the field 'model.{field}' is {model[field]}, and its data have {wanted}. "
                "Restore it from a copy."
            )


def check_tensors(state: dict[str, Any], path: Path) -> None:
    """Raise `UserError` unless these are dense tensors, all there, and no larger than the file.

    Args:
        path: the file that they are from.
    """
    claimed = 0
    for name, value in state.items():
        kind = _unusual(value)
        if kind:
            raise UserError(
                f"'{path}' holds {kind} under '{name}', and a dense tensor is wanted. Save "
                "model.state_dict() of the network itself, with its weights in memory and in floating point."
            )
        claimed += value.numel() * value.element_size()
    held = path.stat().st_size
    if claimed > MOST_SHARED * held + 2**20:
        raise UserError(
            f"'{path}' is damaged, or made to fill the memory: its tensors would take {claimed / 2**20:,.0f} MB, and "
            f"the file has {held / 2**20:,.1f}. Copy it again from its source."
        )


def _unusual(value: Any) -> str | None:
    """What it is, if it is no dense tensor."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a sparse tensor ({value.layout})"
    if value.is_quantized:
        return f"a quantized tensor ({value.dtype})"
    if value.device.type != "cpu":
        return f"a tensor without values (on the device '{value.device.type}')"
    return None


def is_ours(content: Any) -> bool:
    """Whether this is what `save_checkpoint` wrote, in any format."""
    return isinstance(content, dict) and {"format", *FIELDS} <= content.keys()


def load(path: str | Path, model: str | None = None) -> nn.Module:
    """The model of one checkpoint file, in eval mode on the CPU.

    Args:
        path: of the file, in a folder of a run of ours.
        model: for a network of your own, the `package.module:factory` it was trained with.

    Raises:
        UserError: see `read_checkpoint` and `Checkpoint.build`.
    """
    with naming(f"'{path}'"):
        return read_checkpoint(path).build(model)
