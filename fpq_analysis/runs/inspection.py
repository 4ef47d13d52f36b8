"""What is in a checkpoint file, and is it safe to use?  Nothing in the file is run to find out.

What a file would have to import is read off its pickle, as text; only a file of tensors and plain values is loaded.
"""

from __future__ import annotations

import json
import math
import pickletools
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import pandas as pd
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from fpq_analysis.errors import UserError
from fpq_analysis.files import has_checksums, sha256
from fpq_analysis.quantizers import QuantSpec, stored_quantizers
from fpq_analysis.runs import checkpoint as ckpt
from fpq_analysis.runs.foreign import foreign_epochs
from fpq_analysis.runs.run import CHECKPOINT_NAME, FOREIGN_OPTIONS, Run
from fpq_analysis.runs.states import find_state
from fpq_analysis.schema import CheckpointFile, check

COLUMNS = ["field", "value"]
RUN_COLUMNS = ["file", "epoch", "size", "sha256", "hash", "test accuracy"]
QUANTIZER_COLUMNS = ["layer", "of", "bits", "step sizes", "smallest", "median", "largest"]
# What plain tensors are pickled with; `torch.load` decides what is safe, these are only left out of a list of names.
TENSORS = re.compile(r"torch\._utils\._rebuild_\w+|torch\.\w+Storage|torch\.storage\.\w+|collections\.OrderedDict")
SHOWN = 3


def inspect_checkpoint(path: str | Path) -> pd.DataFrame:
    """Describe the checkpoint file `path`, of ours or a foreign state dict.

    Returns:
        field, value: two columns of text.  `kind` is `fpq-analyze checkpoint`, `foreign state dict` or `other`;
        `non-finite` names tensors that hold NaN or infinity.

    Raises:
        UserError: if the file is missing, cut short, differs from its manifest, or would have to run code to load
            (with the names it would import).
    """
    path = Path(path)
    about = _about(path)
    if (header := _safetensors(path)) is not None:
        how = f"safetensors.torch.load_file('{path.name}')"
        scalars = sum(math.prod(entry["shape"]) for entry in header.values())
        kind = ("kind", "foreign state dict, safetensors")
        return _frame(
            [
                kind,
                *about,
                _intact(path, about),
                ("tensors", str(len(header))),
                ("scalars", f"{scalars:,}"),
                _how_to_use(how),
            ]
        )
    content = _load(path)
    about += [_intact(path, about), ("safe", "yes: tensors and plain values only")]
    if ckpt.is_ours(content):
        check(CheckpointFile, content, f"'{path}'")
        ckpt.check_tensors(content["state_dict"], path)
        kind = ("kind", "fpq-analyze checkpoint")
        return _frame([kind, *about, *_ours(content), *_versions(path.parent), *_tensors(content["state_dict"])])
    state, keys = find_state(content)
    if not state:
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        return _frame([("kind", "other"), *about, ("holds", held[:200] or "nothing")])
    ckpt.check_tensors(state, path)
    within = "".join(f"['{key}']" for key in keys)
    how = f"torch.load('{path.name}', weights_only=True){within}"
    kind = ("kind", "foreign state dict" + (f", under {', '.join(map(repr, keys))}" if keys else ""))
    epoch = [("epoch", str(content["epoch"]))] if type(content.get("epoch")) is int else []
    return _frame([kind, *about, *epoch, *_tensors(state), _how_to_use(how)])


def inspect_quantizers(path: str | Path) -> pd.DataFrame:
    """Bits and step sizes of every quantizer in one of our checkpoints; no rows for a float network.

    Returns:
        layer, of (weight or input), bits, step sizes (how many), smallest, median, largest.

    Raises:
        UserError: see `inspect_checkpoint`.
    """
    content = _load(Path(path))
    try:
        rows = list(_quantizers(content)) if ckpt.is_ours(content) and content["quant"] else []
    except (KeyError, RuntimeError) as error:
        raise UserError(f"'{path}' holds other quantizers than it says: {str(error).splitlines()[0]}") from error
    return pd.DataFrame(rows, columns=QUANTIZER_COLUMNS)


def inspect_run(run: str | Path) -> pd.DataFrame:
    """The checkpoints of a run, of ours or of another program.

    Returns:
        file, epoch, size (bytes), sha256, hash (ok, differs, not recorded, or missing), test accuracy (NaN if unknown).

    Raises:
        UserError: if the folder holds no checkpoint.
    """
    folder = Path(run)
    ours = Run(folder)
    manifest = ours.manifest
    files = (ours.checkpoints or foreign_epochs(folder)) if folder.is_dir() else {}
    if not files:
        raise UserError(f"'{folder}' holds no checkpoint (epoch_0000.pt, ...). Give a run's folder, or a file.")
    known = {row["epoch"]: row.get("test_accuracy") for row in ours.rows}
    accuracy = {epoch: float("nan") if value is None else value for epoch, value in known.items()}
    rows: list[tuple[Any, ...]] = []
    for epoch, path in files.items():
        digest = sha256(path)
        status = _agreement(manifest.get(path.name), digest)
        rows.append((path.name, epoch, path.stat().st_size, digest, status, accuracy.get(epoch, float("nan"))))
    for name in sorted(set(manifest) - {path.name for path in files.values()}):
        match = CHECKPOINT_NAME.fullmatch(name)
        if match:
            rows.append((name, int(match[1]), 0, manifest[name], "missing", float("nan")))
    return pd.DataFrame(rows, columns=RUN_COLUMNS)


def unsafe_names(path: Path) -> list[str]:
    """What the file would import to load, beyond what tensors need; read as text, nothing is imported or run.

    Raises:
        UserError: if no pickle can be read from the file.
    """
    try:
        if is_zipfile(path):
            return sorted(get_unsafe_globals_in_checkpoint(path))
        return sorted({name for name in _pickled_names(path) if not TENSORS.fullmatch(name)})
    except Exception as error:  # damage shows in many ways
        if "torchscript" in str(error):
            raise UserError(
                f"'{path}' is a TorchScript archive, which holds a program. Nothing was run. If you trust its maker, "
                "save its state_dict() alone."
            ) from error
        raise _damaged(path, error) from error


def _about(path: Path) -> list[tuple[str, str]]:
    """What is known of it as a file."""
    if not path.is_file():
        raise UserError(f"No checkpoint '{path}'.")
    digest = sha256(path)
    status = _agreement(Run(path.parent).manifest.get(path.name), digest)
    if status == "differs":
        raise UserError(
            f"'{path}' is damaged, or not the file it was: its SHA-256 is {digest[:12]}..., and manifest.json beside "
            "it has another. Copy it again from its source, or train the run anew with --overwrite."
        )
    return [("size", f"{path.stat().st_size:,} bytes"), ("sha256", digest), ("manifest", status)]


def _intact(path: Path, about: list[tuple[str, str]]) -> tuple[str, str]:
    """Whether the file, which could be read, is known to be as it was written."""
    if ("manifest", "ok") in about:
        return "intact", "yes: it has the SHA-256 of manifest.json"
    if has_checksums(path):
        return "intact", "yes: its parts have the checksums that it holds of them"
    return "intact", "not known: it holds no checksums, so a flipped bit would not be seen"


def _load(path: Path) -> Any:
    """The content of a file of tensors and plain values."""
    if not path.is_file():
        raise UserError(f"No checkpoint '{path}'.")
    ckpt.check_stored(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, on the file's form
            return ckpt.load_tensors(path)
    except UserError as error:
        if error.__cause__ is None:  # it says all there is
            raise
        names = unsafe_names(path)
        if not names:
            raise _damaged(path, error.__cause__ or error) from error
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise UserError(
            f"'{path}' is not safe: to load it, Python would have to import and could run {shown}. Nothing was run. If "
            "you trust its maker, load it where it was made, and save its state_dict() alone."
        ) from error


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"'{path}' cannot be read: it is cut short, damaged, or no checkpoint at all ({type(error).__name__}). Copy it "
        "again from its source."
    )


def _agreement(recorded: str | None, digest: str) -> str:
    if recorded is None:
        return "not recorded"
    return "ok" if recorded == digest else "differs"


def _safetensors(path: Path) -> dict[str, Any] | None:
    """The header of a safetensors file: eight bytes of length, then JSON; None for any other file."""
    with path.open("rb") as file:
        start = file.read(9)
        if len(start) < 9 or start[8:] != b"{":
            return None
        (length,) = struct.unpack("<Q", start[:8])
        try:
            header = json.loads(b"{" + file.read(min(length, 2**27) - 1))
        except ValueError:
            return None
    header.pop("__metadata__", None)
    return header


def _pickled_names(path: Path) -> Iterator[str]:
    """`module.name` of everything the pickles of a file in the old format, or of a plain one, would import."""
    with path.open("rb") as file:
        size, done = path.stat().st_size, 0
        while file.tell() < size:
            words: list[str] = []  # STACK_GLOBAL takes module and name from the stack: the last two words, as written
            try:
                for code, value, _ in pickletools.genops(file):
                    if code.name in ("GLOBAL", "INST"):
                        yield str(value).replace(" ", ".")
                    elif code.name == "STACK_GLOBAL":
                        yield ".".join(words[-2:])
                    elif isinstance(value, str):
                        words.append(value)
            except ValueError:
                if not done:
                    raise
                return  # behind its pickles, the old format has the tensors' bytes
            done += 1


def _ours(content: dict[str, Any]) -> list[tuple[str, str]]:
    run, model, data, quant = content["run"], content["model"], content["data"], content["quant"]
    bits = (
        f"W{quant['weight_bits']}A{quant['act_bits']}, first and last layer {quant['edge_bits']}" if quant else "float"
    )
    readable = "" if content["format"] == ckpt.FORMAT else f" (this version reads {ckpt.FORMAT})"
    return [
        ("format", f"{content['format']}{readable}"),
        ("epoch", str(content["epoch"])),
        ("method", str(run.get("method"))),
        ("architecture", f"{model['name']}, {model['num_classes']} classes, {model['in_channels']} channels in"),
        ("bits", bits),
        ("data set", f"{data['name']}, {data['n_train']:,} training images of {data['size']}x{data['size']}"),
        ("training seed", str(run.get("seed"))),
    ]


def _versions(run: Path) -> list[tuple[str, str]]:
    """From `run.json`, where there is one."""
    try:
        return [("versions", ", ".join(f"{k} {v}" for k, v in Run(run).versions.items()))]
    except UserError:
        return []


def _how_to_use(load: str) -> tuple[str, str]:
    return (
        "to use it",
        f"fpq-analyze hessian --ckpt-dir FOLDER {FOREIGN_OPTIONS}; or, after model.load_state_dict({load}), in "
        "Python: fpq_analysis.hessian_trace(model, batches)",
    )


def _tensors(state: dict[str, Tensor]) -> list[tuple[str, str]]:
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in state.values()})
    bad = [name for name, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    named = ", ".join(bad[:SHOWN]) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
    return [
        ("tensors", f"{len(state)} ({', '.join(kinds)})"),
        ("scalars", f"{sum(t.numel() for t in state.values()):,}"),
        ("non-finite", named or "none"),
    ]


def _quantizers(content: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for layer, quantizer, is_weight in stored_quantizers(content["state_dict"], QuantSpec(**content["quant"])):
        steps = quantizer.step_size.detach().float().reshape(-1)
        smallest, median, largest = (float(f()) for f in (steps.min, steps.median, steps.max))
        yield layer, "weight" if is_weight else "input", quantizer.bits, steps.numel(), smallest, median, largest


def _frame(rows: list[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS)
