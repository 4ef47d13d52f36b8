"""The form on disk of a run and its checkpoints; nothing else reads or writes it.

    <run>/run.json          config, versions, what the data set is
    <run>/epoch_0000.pt ... before training and after every epoch: tensors and primitives only
    <run>/manifest.json     SHA-256 of each checkpoint
    <run>/train.jsonl       a row an epoch
    <run>/resume.pt         optimiser state, for going on after a kill; replaced every epoch
    <run>/records/          what was measured (`records.py`)

Every file is replaced in one step or appended to, so a kill at any moment leaves the last good checkpoint readable.
Files are loaded with `weights_only=True`: code inside a checkpoint is never run.
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpq_analysis.errors import UserError
from fpq_analysis.files import atomic_write, sha256, write_json
from fpq_analysis.models import build_model
from fpq_analysis.quantizers import QuantSpec, quantize

FORMAT = 1
CHECKPOINT_NAME = re.compile(r"epoch_(\d{4,})\.pt")
FOREIGN_OPTIONS = "--model package.module:factory --data NAME"  # for files of another program, see `foreign.py`


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
    def said(self) -> dict[str, Any]:
        """What the user said of it that does not stand in the file: of a file of ours, nothing."""
        return {}

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

    Args:
        what: the model's name; whose: the state's, as the beginning of a sentence.
        cure: what to do if they do not fit.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    surplus = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or surplus or reshaped:
        if reshaped:
            key = reshaped[0]
            example = f"'{key}' is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        else:
            example = f"'{missing[0]}' is not in the file" if missing else f"'{surplus[0]}' is not in the model"
        raise UserError(
            f"{whose} does not fit the model {what}: {len(missing)} tensors missing, {len(surplus)} unknown, "
            f"{len(reshaped)} of another shape (for example, {example}). {cure}"
        )
    bad = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise UserError(
            f"The checkpoint holds NaN or infinity in {len(bad)} of {len(state)} tensors (first: '{bad[0]}'), so "
            "nothing measured on it would mean anything. The training diverged; use an earlier epoch, or train again "
            "with a smaller --lr."
        )
    model.load_state_dict(state)


def save_checkpoint(run: Path, checkpoint: dict[str, Any]) -> Path:
    """Write `<run>/epoch_NNNN.pt` and enter its hash in the manifest.

    Args:
        checkpoint: the fields of `Checkpoint` but `sha256`.
    """
    path = run / f"epoch_{checkpoint['epoch']:04d}.pt"
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **checkpoint}, file))
    write_json(run / "manifest.json", {**read_manifest(run), path.name: sha256(path)})
    return path


def read_manifest(run: Path) -> dict[str, str]:
    """File name to SHA-256; empty if the run has no manifest."""
    return _read_json(run / "manifest.json") if (run / "manifest.json").exists() else {}


def load_tensors(path: Path) -> Any:
    """`torch.load` on the CPU, tensors and primitives only.

    Raises:
        UserError: if the file is not there, is damaged, or wants to run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"No checkpoint '{path}'.") from error
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


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify one checkpoint file.

    Raises:
        UserError: if it is missing, damaged, differs from the manifest's hash, holds code, or is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No checkpoint '{path}'.")
    digest = sha256(path)
    recorded = read_manifest(path.parent).get(path.name)
    if recorded is not None and recorded != digest:
        raise UserError(
            f"'{path}' is damaged: its SHA-256 is not the one recorded when it was written. Copy it again "
            "from its source, or train the run anew with --overwrite."
        )
    content = load_tensors(path)
    if not is_ours(content):
        raise UserError(
            f"'{path}' is not a checkpoint written by fpq-analyze. To measure it, say what network it is of and which "
            f"data that was trained on: {FOREIGN_OPTIONS}; or call fpq_analysis.hessian_trace(model, batches) from "
            "Python."
        )
    if content.get("format") != FORMAT:
        raise UserError(f"'{path}' has format {content.get('format')}, and this version reads format {FORMAT}.")
    return Checkpoint(**{field: content[field] for field in FIELDS}, sha256=digest)


def is_ours(content: Any) -> bool:
    """Whether this is what `save_checkpoint` wrote, in any format."""
    return isinstance(content, dict) and {"format", *FIELDS} <= content.keys()


def load(path: str | Path, model: str | None = None) -> nn.Module:
    """The model of one checkpoint file, in eval mode on the CPU.

    Args:
        model: for a network of your own, the `package.module:factory` it was trained with.

    Raises:
        UserError: see `read_checkpoint` and `Checkpoint.build`.
    """
    return read_checkpoint(path).build(model)


def find_runs(folder: str | Path) -> list[Path]:
    """Every run at or below `folder`, sorted: the folders that hold `epoch_NNNN.pt` files.

    Raises:
        UserError: if the folder does not exist or holds no checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"No folder '{folder}'. A run, or a folder of runs, is wanted; 'fpq-analyze train' makes one.")
    runs = sorted({path.parent for path in folder.rglob("epoch_*.pt") if CHECKPOINT_NAME.fullmatch(path.name)})
    if not runs:
        raise UserError(
            f"'{folder}' holds no checkpoints (files named epoch_0000.pt, ...), nor does any folder below it. "
            f"'fpq-analyze train' or 'fpq-analyze demo' makes some. For those of another program: {FOREIGN_OPTIONS}."
        )
    return runs


def checkpoints(run: Path) -> dict[int, Path]:
    """Epoch to file for one run, in order of epochs."""
    found = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in run.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def file_hash(path: Path) -> str:
    """SHA-256 of a checkpoint: the one recorded when it was written, or else of the file."""
    return read_manifest(path.parent).get(path.name) or sha256(path)


def find_teacher(run: Path) -> Path | None:
    """The float checkpoint that `run` started from; None for a run that started from none.

    It is looked for where it was, and beside `run`, should both have been moved.

    Raises:
        UserError: if it is not there, or no longer the same.
    """
    about = read_run(run)
    init, wanted = about["config"].get("init"), about.get("teacher")
    if init is None or wanted is None:
        return None
    for folder in (Path(init), run.parent / Path(init).name):
        for path in checkpoints(folder).values() if folder.is_dir() else ():
            if file_hash(path) == wanted:
                return path
    raise UserError(
        f"The float network that '{run}' started from is not in '{init}', nor in '{run.parent / Path(init).name}' "
        f"(SHA-256 {wanted[:12]}...). Move its run there, or run the command in the folder where it was trained."
    )


def read_run(run: Path) -> dict[str, Any]:
    """The content of `run.json`.

    Raises:
        UserError: if the file is missing or is not JSON.
    """
    path = run / "run.json"
    if not path.exists():
        raise UserError(f"'{run}' is not a run: it has no run.json. 'fpq-analyze train' makes one.")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"'{path}' is damaged: it is not a JSON object. Restore it from a copy.") from error


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("fpq-analysis", "torch", "torchvision", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
