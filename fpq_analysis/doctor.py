"""Can curvature be measured on this model, and what will it cost?  Every check a sentence, every fault with its cure.

A Hessian comes out wrong without a word when the model draws random numbers, mixes the images of a batch, or holds an
`autograd.Function` whose backward is not a derivative, or cannot be differentiated itself.  So the checks are numeric:
they run the model on a few images, look at what autograd makes of it, and name the module or Function at fault.

All of it happens on copies: the model, its mode, buffers, gradients and hooks, and the random state are untouched.
"""

from __future__ import annotations

import copy
import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional as F
from torch.nn.modules._functions import BackwardHookFunction
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from fpq_analysis import checkpoint as ckpt
from fpq_analysis.curvature import (
    HessianOperator,
    MixedSamplesError,
    NotExactError,
    as_batches,
    certify,
    check_samples_apart,
    per_sample_traces,
)
from fpq_analysis.curvature.batches import INPUT_SCALARS, LARGEST, Batch, full_precision
from fpq_analysis.curvature.certificate import spread
from fpq_analysis.curvature.operator import Loss
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.devices import pick_device
from fpq_analysis.errors import UserError
from fpq_analysis.models import model_device
from fpq_analysis.quantizers import clipped_fraction, quantizers, variables
from fpq_analysis.quantizers import view as take_view

OK, NOTE, FAULT = "ok", "note", "fault"
COLUMNS = ["check", "status", "finding", "cure"]
FEW = 8  # images for everything that one image would show as well
MUCH_CLIPPED = 0.05
# Relative disagreement beyond rounding: of u.Hv with v.Hu, of repeated gradients, of a derivative with differences.
ASYMMETRY = {torch.float64: 1e-8, torch.float32: 1e-3}
REPEAT = 1e-4
DIFFERENCE = 1e-3
STEP = 1e-6
TURNS = 3  # directions that must all disagree: one may step over a kink, hardly all

FORECAST_IMAGES = 32
EIGENVALUE_PRODUCTS = 60
DENSITY_PRODUCTS = 100

MATH_KERNEL = (
    "Measure inside `with sdpa_kernel(SDPBackend.MATH):`, both from torch.nn.attention, which computes the same by "
    "operations that can be differentiated twice."
)
NO_GRAPHS = (
    "Keep tensors that carry a graph out of its attributes; weight_norm and spectral_norm do in their form of "
    "torch.nn.utils.parametrizations."
)
NOT_REENTRANT = "Give torch.utils.checkpoint use_reentrant=False: with True, it leaves gradients out without a word."
NO_CUDNN = "Measure inside `with torch.backends.cudnn.flags(enabled=False):`."
PLAIN_BACKWARD = (
    "Write its backward with differentiable operations on ctx.saved_tensors (no once_differentiable, no_grad, .data, "
    ".detach() or numpy)."
)
PLAIN_FORWARD = (
    "Let its backward be the derivative of one function, or write the forward in plain operations, x + (q(x) - x)"
    ".detach() for a straight-through estimator."
)


class Finding(NamedTuple):
    """What one check says: `status` ok, note or fault; a sentence; and what to do about it."""

    status: str
    finding: str
    cure: str = ""


def diagnose(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | Loss = "cross_entropy",
    mode_as_found: bool = True,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Check whether the curvature of `model` can be measured on these data.

    Args:
        model: any `nn.Module` whose output the loss takes; quantized ones are checked as `dequantized`.
        batches: a pair (inputs, targets) of tensors, or any iterable of such pairs.
        loss: `cross_entropy`, or a function (outputs, targets) to the *mean* over the batch.
        mode_as_found: whether training mode is a fault where it matters; all else is checked in eval mode.
        device: where to compute; None for where the model is.
        seed: of the random directions.

    Returns:
        A row a check: check, status (ok, note or fault), finding (one sentence), cure (what to do, or empty).  Checks
        that a fault makes meaningless are left out.

    Raises:
        UserError: if there are no data, or the loss has an unknown name.
    """
    function = _loss(loss)
    where = torch.device(device) if device is not None else model_device(model)
    data = [(x.to(where), y.to(where)) for x, y in as_batches(batches)]
    found = {"mode": _mode(model) if mode_as_found else Finding(OK, "Every check runs in eval mode.")}
    found["weights"] = _weights(model.named_parameters(), model.named_buffers())
    found["quantizers"] = _quantizers(model)
    found["TF32"] = _tf32(where)
    if all(finding.status != FAULT for name, finding in found.items() if name != "mode"):
        with _same_random_state(where):
            found |= _run(model, data, function, where, seed)
    return _frame(found)


def diagnose_checkpoint(
    path: str | Path,
    *,
    n_data: int = 256,
    seed: int = 0,
    data_root: str | None = None,
    model: str | None = None,
    device: str = "auto",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`diagnose` and `forecast_measurements` for a checkpoint file, or for the last one of a run.

    Args:
        n_data: training images, drawn by `seed`, to check on and to forecast for.
        data_root: where the data set lies, if not where it was when the run was trained.
        model: for a network of your own, `package.module:factory`.

    Returns:
        The checks; and the forecast, empty if there is a fault.

    Raises:
        UserError: if the file or the data are not there, or the file does not fit the model.
    """
    path, where = Path(path), pick_device(device)
    if path.is_dir():
        existing = ckpt.checkpoints(path)
        if not existing:
            raise UserError(f"'{path}' holds no checkpoint (epoch_0000.pt, ...). Give a run's folder, or a file.")
        path = existing[max(existing)]
    content = ckpt.read_checkpoint(path)
    weights = _weights(content.state_dict.items())
    if weights.status == FAULT:  # which no model can be built from
        return _frame({"weights": weights}), _no_forecast()
    net = content.build(model).to(where)
    config = content.run
    data = load_dataset(config["data"], data_root or config["data_root"], image_size=config["image_size"])
    batch = training_sample(data, n_data, seed)
    frame = diagnose(net, batch, device=where, seed=seed)
    if data.fingerprint != content.data["fingerprint"]:
        other = Finding(
            FAULT,
            f"The images of '{data.name}' found here are not those the checkpoint was trained on.",
            "Point --data-root at the data set of the training run.",
        )
        frame = pd.concat([_frame({"data": other}), frame], ignore_index=True)
    if (frame["status"] == FAULT).any():
        return frame, _no_forecast()
    return frame, forecast_measurements(net, batch, device=where, seed=seed)


def _frame(found: dict[str, Finding]) -> pd.DataFrame:
    return pd.DataFrame([(name, *finding) for name, finding in found.items()], columns=COLUMNS)


def _loss(loss: str | Loss) -> Loss:
    if not isinstance(loss, str):
        return loss
    if loss != "cross_entropy":
        raise UserError(f"Unknown loss '{loss}'. Give 'cross_entropy', or a function (outputs, targets) to the mean.")
    return F.cross_entropy


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield


# What is read off the model, without running it.


def _mode(model: nn.Module) -> Finding:
    random = [(name, m) for name, m in model.named_modules() if m.training and _draws(m)]
    norms = [
        (name, m)
        for name, m in model.named_modules()
        if m.training and isinstance(m, _BatchNorm) and m.running_mean is not None
    ]
    if random:
        return Finding(
            FAULT,
            f"{_label(*random[0])} is in training mode{_others(random)}, so every forward pass is another function.",
            "Call model.eval() before measuring.",
        )
    if norms:
        return Finding(
            FAULT,
            f"{_label(*norms[0])} is in training mode{_others(norms)}, so it normalises over the batch, and every "
            "forward pass moves its running statistics.",
            "Call model.eval() before measuring.",
        )
    if model.training:
        return Finding(OK, "The model is in training mode, which none of its layers minds.")
    return Finding(OK, "The model is in eval mode.")


def _draws(module: nn.Module) -> bool:
    """Does this layer draw random numbers in training mode?"""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.dropout > 0
    return isinstance(module, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))


def _weights(parameters: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]] = ()) -> Finding:
    """Finite?  Step sizes that were never set are left to `_quantizers`; buffers may hold infinity, as masks do."""
    named, fixed = list(parameters), list(buffers)
    shapeless = [name for name, t in (*named, *fixed) if is_lazy(t)]
    if shapeless:
        return Finding(
            FAULT,
            f"'{shapeless[0]}' has no shape yet{_others(shapeless)}.",
            "Run the model once on a batch, before measuring.",
        )
    bad = [name for name, t in named if t.is_floating_point() and not bool(torch.isfinite(t.detach()).all())]
    bad = [name for name in bad if not name.endswith("step_size")]
    bad += [name for name, t in fixed if bool(t.isnan().any())]
    if bad:
        return Finding(
            FAULT,
            f"'{bad[0]}' holds NaN or infinity{_others(bad)}.",
            "The training diverged: use an earlier epoch, or train again with a smaller learning rate.",
        )
    return Finding(OK, f"All of the {len(named) + len(fixed)} tensors are finite.")


def _quantizers(model: nn.Module) -> Finding:
    found = list(quantizers(model))
    unset = [name for name, quantizer, _ in found if bool(quantizer.step_size.isnan().any())]
    if unset:
        return Finding(
            FAULT,
            f"The quantizer of '{unset[0]}' was never calibrated{_others(unset)}, so its output is NaN.",
            "Call fpq_analysis.calibrate(model, images, 'mse'), or load a trained state.",
        )
    if not found:
        return Finding(OK, "The model has no quantizers of this package.")
    share = clipped_fraction(model)
    text = (
        f"All of the {len(found)} quantizers are calibrated; {100 * share:.1f} % of the quantized weights are clipped."
    )
    if share > MUCH_CLIPPED:
        return Finding(NOTE, text, "Prefer the definition 'dequantized': in 'latent', clipped weights look flat.")
    return Finding(OK, text)


def _tf32(device: torch.device) -> Finding:
    if device.type != "cuda":
        return Finding(OK, f"The device is {device.type}, which has no TF32.")
    backends: Any = torch.backends  # typed in part only
    places = {"matrix products": backends.cuda.matmul, "convolutions": backends.cudnn.conv}
    found = [name for name, place in places.items() if place.fp32_precision == "tf32"]
    if not found:
        return Finding(OK, "TF32 is off.")
    return Finding(
        NOTE,
        f"TF32 is on for {' and '.join(found)}, which rounds what is multiplied to three digits.",
        "Nothing to do: measurements switch it off for themselves; elsewhere set fp32_precision = 'ieee'.",
    )


# What needs the model to run.


class _Case:
    """One patient: a plain copy in eval mode, data, and what several checks want to know."""

    def __init__(self, model: nn.Module, data: list[Batch], loss: Loss, device: torch.device, seed: int) -> None:
        self.original = model
        self.model = take_view(model, "dequantized").to(device)
        self.data = data
        self.loss = loss
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        x, y = data[0]
        self.few: Batch = (x[:FEW], y[:FEW])
        self.variables = variables(self.model)

    def random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    @cached_property
    def precise(self) -> _Case:
        """The same in float64 on few images; this one where the model or the device does not know float64."""
        x, y = self.few
        with suppress(RuntimeError, TypeError, ValueError):
            model = copy.deepcopy(self.model).double()
            data = tuple(t.double() if t.is_floating_point() else t for t in (x, y))
            case = _Case(model, [data], self.loss, self.device, 0)  # type: ignore[list-item]
            if case.loss_on(case.few).dtype == torch.float64:
                return case
        return _Case(self.model, [self.few], self.loss, self.device, 0)

    def loss_on(self, batch: Batch) -> Tensor:
        return self.loss(self.model(batch[0]), batch[1])

    def gradients(self, create_graph: bool = False) -> dict[str, Tensor | None]:
        """Of the loss on few images, by name; None for a parameter it does not use."""
        found = torch.autograd.grad(
            self.loss_on(self.few), list(self.variables.values()), create_graph=create_graph, allow_unused=True
        )
        return dict(zip(self.variables, found, strict=True))

    @cached_property
    def functions(self) -> list[_Verdict]:
        """On every custom `autograd.Function` in the graph, checked alone."""
        return _check_functions(self.precise)


def _run(model: nn.Module, data: list[Batch], loss: Loss, device: torch.device, seed: int) -> dict[str, Finding]:
    compiled = [(name, m) for name, m in model.named_modules() if hasattr(m, "_orig_mod")]
    if compiled:
        fault = f"{_label(*compiled[0])} is compiled, and torch.compile gives first derivatives only."
        return {"compiled": Finding(FAULT, fault, "Measure the module within: model._orig_mod.")}
    try:
        with full_precision():
            case = _Case(model, data, loss, device, seed)
    except Exception as error:  # the user's code: anything can happen
        fault = f"The model cannot be copied ({_short(error)}), and measurements work on copies."
        return {"copy": Finding(FAULT, fault, NO_GRAPHS)}
    found: dict[str, Finding] = {}
    for name, check in CHECKS.items():
        settings = nullcontext() if name in AS_FOUND else full_precision()
        try:
            with settings:
                found[name] = check(case)
        except Exception as error:  # likewise
            found[name] = Finding(NOTE, f"The check itself failed ({_short(error)}).")
        if name in ESSENTIAL and found[name].status == FAULT:
            break
    return found


def _variables(case: _Case) -> Finding:
    if not case.variables:
        return Finding(
            FAULT, "No parameter is trainable, so the Hessian is empty.", "Set requires_grad on those to be measured."
        )
    names: dict[int, list[str]] = {}
    for name, p in case.original.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    tied = [same for same in names.values() if len(same) > 1]
    if tied:
        return Finding(
            NOTE,
            f"'{tied[0][0]}' and '{tied[0][1]}' are one tensor{_others(tied)}, which counts once in the Hessian.",
            "Nothing to do, unless it was not meant; the exact trace needs untied weights.",
        )
    n = sum(p.numel() for p in case.variables.values())
    return Finding(OK, f"The Hessian is that of {n:,} weights in {len(case.variables)} tensors.")


def _dtype(case: _Case) -> Finding:
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in case.variables.values()})
    if len(kinds) > 1:
        return Finding(NOTE, f"The weights are of several types ({', '.join(kinds)}).", "model.float() makes them one.")
    if kinds[0] not in ("float32", "float64"):
        return Finding(NOTE, f"The weights are {kinds[0]}, too coarse for second derivatives.", "Use model.float().")
    return Finding(OK, f"The weights are {kinds[0]}.")


def _finite(case: _Case) -> Finding:
    """Of the loss on all data and its gradient on few."""
    for x, y in case.data:
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            return Finding(FAULT, "The inputs hold NaN or infinity.", "Check the images and their normalisation.")
        try:
            with torch.no_grad():
                outputs = case.model(x)
                if case.loss is F.cross_entropy:
                    _check_targets(outputs, y)
                value = case.loss(outputs, y)
        except Exception as error:  # the user's code: anything can happen
            return Finding(
                FAULT,
                f"The loss cannot be computed on these data ({_short(error)}).",
                "Check the inputs' shape and type, and that targets are class numbers from 0 to C - 1; where the model "
                "gives more than logits, give loss=lambda outputs, targets: ...",
            )
        if value.numel() != 1:
            shape = tuple(value.shape)
            return Finding(FAULT, f"The loss has the shape {shape}, and must be one number.", "Give the mean.")
        if not bool(torch.isfinite(value)):
            first = next((s for s in _steps(case.model, x) if not bool(torch.isfinite(s.value).all())), None)
            where = f"; {first.label} is the first whose output is not" if first else ""
            return Finding(FAULT, f"The loss is not finite{where}.", "Check the inputs' scale, or use model.double().")
    bad = [name for name, g in case.gradients().items() if g is not None and not bool(torch.isfinite(g).all())]
    if bad:
        return Finding(
            FAULT,
            f"The gradient of '{bad[0]}' is not finite{_others(bad)}, though the loss is.",
            "Look for sqrt, log, norm or a division at zero; add a small constant inside.",
        )
    return Finding(OK, "The loss and its gradient are finite.")


def _check_targets(outputs: Tensor, y: Tensor) -> None:
    # On CUDA, cross-entropy answers a class that is not there with an error that ends the process.
    if not y.is_floating_point() and (int(y.min()) < 0 or int(y.max()) >= outputs.shape[1]):
        raise ValueError(f"targets from {int(y.min())} to {int(y.max())} for {outputs.shape[1]} classes")


def _used(case: _Case) -> Finding:
    unused = [name for name, g in case.gradients().items() if g is None]
    if unused:
        return Finding(
            NOTE,
            f"The loss does not use '{unused[0]}'{_others(unused)}, whose rows of the Hessian are zero.",
            "Nothing to do; set requires_grad_(False) on it to leave it out.",
        )
    return Finding(OK, "The loss uses every weight.")


def _apart(case: _Case) -> Finding:
    try:
        check_samples_apart(case.model, case.data)
    except (MixedSamplesError, ValueError, RuntimeError):  # a BatchNorm by batch refuses a single image
        x = spread(case.data, 3)
        pairs = zip(_steps(case.model, x), _steps(case.model, x[:2]), strict=False)
        first = next((a for a, b in pairs if _differ(a.value[:2], b.value, 1e-2)), None)
        return Finding(
            FAULT,
            f"An image's output depends on the others in its batch{f', from {first.label} on' if first else ''}.",
            "Normalise over channels or layers (GroupNorm, LayerNorm), or by running statistics: the loss must be a "
            "mean over images.",
        )
    return Finding(OK, "Each image's output depends on that image alone.")


def _repeatable(case: _Case) -> Finding:
    first, second = (_steps(case.model, case.few[0]) for _ in range(2))
    changed = next((a for a, b in zip(first, second, strict=False) if _differ(a.value, b.value, REPEAT)), None)
    if changed:
        return Finding(
            FAULT,
            f"Two forward passes in eval mode differ, from {changed.label} on.",
            "Switch its random numbers off in eval mode, as F.dropout(x, p, training=self.training) does.",
        )
    pairs = list(zip(case.gradients().items(), case.gradients().values(), strict=True))
    far = [name for (name, a), b in pairs if a is not None and b is not None and _differ(a, b, REPEAT)]
    if far:
        return Finding(
            FAULT,
            f"Two gradients of '{far[0]}' differ{_others(far)}, though the forward passes agree.",
            "Look for random numbers in a backward pass or a backward hook.",
        )
    if not all(a is None or b is None or torch.equal(a, b) for (_, a), b in pairs):
        return Finding(
            NOTE,
            "Two gradients differ in their last digits, by the order in which the device adds.",
            "Nothing to do; torch.use_deterministic_algorithms(True) fixes the order.",
        )
    return Finding(OK, "Two forward passes agree, and so do two gradients.")


def _in_place(case: _Case) -> Finding:
    steps = _steps(case.model, case.few[0])
    overwritten = [i for i, step in enumerate(steps) if step.output._version != step.version]
    # A layer that works in place gives its input back: what it overwrote is the output of the layer before.
    if not overwritten:
        return Finding(OK, "No layer's output is overwritten after the hooks on it have run.")
    step = steps[overwritten[0]]
    later = [s for s in steps[overwritten[0] + 1 :] if _storage(s.output) == _storage(step.output)]
    by = next((s.label for s in later if s.version > step.version), "a later operation")
    return Finding(
        NOTE,
        f"{by} overwrites the output of {step.label}{_others(overwritten)}, so a forward hook that keeps it will "
        "find other values there.",
        "Build the activation with inplace=False, or keep output.clone() in the hook.",
    )


def _custom(case: _Case) -> Finding:
    """Of custom Functions: is what autograd takes for the derivative of their backward one?"""
    groups: dict[str, list[_Verdict]] = {}
    for verdict in case.functions:
        groups.setdefault(verdict.status, []).append(verdict)
    if wrong := groups.get("wrong"):
        return Finding(
            FAULT,
            f"The second derivative of {wrong[0].label} is silently wrong{_others(wrong)}: {wrong[0].detail}.",
            PLAIN_BACKWARD,
        )
    if stopped := groups.get("raises"):
        return _stopped(stopped)
    if field := groups.get("asymmetric"):
        text = f"What {field[0].label} passes back is not the derivative of one function{_others(field)}"
        return Finding(NOTE, f"{text}; the row 'symmetric' says whether that matters here.", PLAIN_FORWARD)
    if unknown := groups.get("unknown"):
        return Finding(NOTE, f"{unknown[0].label} could not be checked alone ({unknown[0].detail}){_others(unknown)}.")
    if not case.functions:
        return Finding(OK, "There is no custom autograd.Function in the graph.")
    names = ", ".join(v.label for v in case.functions)
    return Finding(OK, f"Custom autograd.Functions, checked one by one: {names}.")


def _stopped(functions: list[_Verdict]) -> Finding:
    first = functions[0]
    text = f"{first.label} cannot be differentiated twice ({first.detail}){_others(functions)}."
    return Finding(FAULT, text, NOT_REENTRANT if "use_reentrant" in first.detail else PLAIN_BACKWARD)


def _twice(case: _Case) -> Finding:
    found = _differentiate_twice(case)
    if found.status == FAULT:
        with full_precision():
            mended = _differentiate_twice(case).status == OK
        if mended:
            return Finding(NOTE, found.finding, f"Measurements here see to it; in code of your own: {found.cure}")
    return found


def _differentiate_twice(case: _Case) -> Finding:
    places = _Places(case.model)
    try:
        with places:
            loss = case.loss_on(case.few)
        nodes = list(_nodes(loss))
        first = torch.autograd.grad(loss, list(case.variables.values()), create_graph=True, allow_unused=True)
        outputs = [g for g in first if g is not None and g.requires_grad]
        if outputs:
            vectors = [case.random(g) for g in outputs]
            torch.autograd.grad(outputs, list(case.variables.values()), vectors, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        return _not_twice(case, error, nodes, places)
    return Finding(OK, "The loss can be differentiated twice.")


def _not_twice(case: _Case, error: Exception, nodes: list[Any], places: _Places) -> Finding:
    stopped = [v for v in case.functions if v.status == "raises"]
    if stopped:
        return _stopped(stopped)
    # Autograd names the operation; `aten::_some_op_backward` belongs to the node `SomeOpBackward0`.
    named = re.search(r"(?:aten::)?_*(\w+?)_backward\b", str(error))
    operation = named[1] if named else ""
    same = [n for n in nodes if re.sub(r"Backward\d*$", "", n.name()).lower() == operation.replace("_", "").lower()]
    owner = places.owner(same[0]) if same else "The model"
    if "attention" in operation:
        text = f"{owner} uses fused attention{_others(same)}, which has no second derivative ('{operation}')."
        return Finding(FAULT, text, MATH_KERNEL)
    if "cudnn_rnn" in str(error):
        return Finding(FAULT, "cuDNN's recurrent layers have no second derivative.", NO_CUDNN)
    if named:
        text = f"{owner} uses '{operation}'{_others(same)}, which has no second derivative."
        return Finding(FAULT, text, "Write it in plain operations, as F.relu6(x + 3) / 6 is for hardsigmoid.")
    return Finding(FAULT, f"The model has no second derivative ({_short(error)}).", "Use plain operations throughout.")


def _symmetric(case: _Case) -> Finding:
    exact = case.precise
    operator = HessianOperator(exact.model, exact.loss, exact.data, exact.variables)
    everywhere = slice(0, operator.size)
    try:
        gap = _asymmetry(operator, everywhere, exact)
    except (RuntimeError, NotImplementedError):
        return Finding(NOTE, "Not checked, as there is no second derivative.")
    tolerance = ASYMMETRY.get(operator.dtype, 1e-2)
    if gap <= tolerance:
        digits = str(operator.dtype).removeprefix("torch.")
        return Finding(OK, f"The Hessian is symmetric: u.Hv and v.Hu differ by {gap:.0e} ({digits}).")
    text = f"The Hessian is not symmetric: u.Hv and v.Hu differ by {gap:.0e}"
    for status, cure in (("asymmetric", PLAIN_FORWARD), ("wrong", PLAIN_BACKWARD)):
        culprits = [v for v in case.functions if v.status == status]
        if culprits:
            return Finding(FAULT, f"{text}, through the backward of {culprits[0].label}{_others(culprits)}.", cure)
    hooked = [(n, m) for n, m in case.model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    if hooked:
        return Finding(FAULT, f"{text}; {_label(*hooked[0])} has a backward hook.", "Remove it: it changes gradients.")
    last = next(
        (n for n in reversed(operator.names) if _asymmetry(operator, operator.slices[n], exact) > tolerance), ""
    )
    where = f", first behind '{last}'" if last else ""
    return Finding(FAULT, f"{text}{where}.", "Look there for a gradient that is not the derivative of the forward.")


def _asymmetry(operator: HessianOperator, block: slice, case: _Case) -> float:
    """|u.Hv - v.Hu| for random u and v within `block`, relative to the sizes of the vectors."""
    u, v = (torch.zeros(operator.size, dtype=operator.dtype, device=operator.device) for _ in range(2))
    for vector in (u, v):
        vector[block] = case.random(vector[block])
    hu, hv = operator.matmat(torch.stack([u, v], 1)).unbind(1)
    scale = float(hu[block].norm() * v.norm() + hv[block].norm() * u.norm()) / max(1, int(u.count_nonzero())) ** 0.5
    return float((u @ hv - v @ hu).abs()) / scale if scale else 0.0


def _exact(case: _Case) -> Finding:
    if case.loss is not F.cross_entropy:
        return Finding(NOTE, "The exact trace is for cross-entropy only.", "Use method='auto' or 'hutchinson'.")
    try:
        certify(case.model, case.data, case.variables)
    except NotExactError as outside:
        # The check differentiates twice itself, though the exact trace does not.
        cure = "Mend that first." if outside.__cause__ else "Use method='auto': Hutchinson's estimator, with its error."
        return Finding(NOTE, f"The exact trace does not hold: {outside}.", cure)
    return Finding(OK, "The exact trace holds: the logits are piecewise linear in every weight.")


CHECKS: dict[str, Callable[[_Case], Finding]] = {
    "variables": _variables,
    "dtype": _dtype,
    "finite": _finite,
    "used": _used,
    "repeatable": _repeatable,
    "samples apart": _apart,
    "in place": _in_place,
    "Functions": _custom,
    "differentiable twice": _twice,
    "symmetric": _symmetric,
    "exact trace": _exact,
}
ESSENTIAL = ("variables", "finite", "repeatable")  # a fault here makes the rest meaningless
AS_FOUND = ("differentiable twice",)  # with the user's choice of kernels; the others with that of measurements


# Custom Functions, one by one.


@dataclass(frozen=True)
class _Verdict:
    label: str
    status: str  # fine, wrong, asymmetric, raises or unknown
    detail: str = ""


def _check_functions(case: _Case) -> list[_Verdict]:
    places = _Places(case.model)
    with places:
        loss = case.loss_on(case.few)
    nodes: dict[Any, Any] = {}
    for node in _nodes(loss):
        function = getattr(node, "_forward_cls", None)  # of Python's Functions only
        if function is not None and function is not BackwardHookFunction:
            nodes.setdefault(function, node)
    verdicts = []
    for function, node in nodes.items():
        label = f"'{function.__name__}' in {places.owner(node)}"
        try:
            status, detail = _check_function(function, _arguments(function, case), case)
        except Exception as error:  # the user's code: anything can happen
            status, detail = "unknown", _short(error)
        verdicts.append(_Verdict(label, status, detail))
    return verdicts


def _arguments(function: Any, case: _Case) -> tuple[Any, ...]:
    """What the Function is first called with in a forward pass."""
    # `forward` is looked up on the class at each call, whoever kept a reference to `apply`.
    own, forward = "forward" in vars(function), vars(function).get("forward")
    original = function.forward
    skip = 1 if function.setup_context is _SingleLevelFunction.setup_context else 0  # ctx
    seen: list[tuple[Any, ...]] = []

    def record(*args: Any) -> Any:
        seen.append(args[skip:])
        return original(*args)

    function.forward = staticmethod(record)
    try:
        case.loss_on(case.few)
    finally:
        if own:
            function.forward = forward
        else:
            del function.forward
    return seen[0]


def _check_function(function: Any, arguments: tuple[Any, ...], case: _Case) -> tuple[str, str]:
    """Is the derivative that autograd takes of the backward pass symmetric, and that by differences?

    With G(x) = J(x)^T w the gradient it passes on, for a fixed w, the derivative of G is a Hessian: of w . f(x).  A
    straight-through estimator passes: its G is piecewise constant, and so is taken to be.
    """
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
    start = [arguments[i].detach() for i in tensors]
    weights: list[Tensor] = []

    def gradient(values: list[Tensor]) -> Tensor:
        given = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        for i, value in zip(tensors, values, strict=True):
            given[i] = value.view_as(value)  # the Function may work in place
        torch.manual_seed(0)
        outputs = function.apply(*given)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else [outputs]) if _differentiable(o)]
        if not weights:
            weights.extend(case.random(o) for o in outputs)
        found = torch.autograd.grad(outputs, values, weights, create_graph=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in found])

    sizes = [t.numel() for t in start]
    leaves = [t.clone().requires_grad_() for t in start]
    try:
        g = gradient(leaves)
        products: list[tuple[Tensor, Tensor]] = []  # (v, H^T v)
        for _ in range(TURNS + 1):
            v = torch.cat([case.random(t).reshape(-1) * (_rms(t) or 1.0) for t in start])
            if g.requires_grad:
                found = torch.autograd.grad(g, leaves, v, retain_graph=True, materialize_grads=True)
                products.append((v, torch.cat([h.reshape(-1) for h in found])))
            else:
                products.append((v, torch.zeros_like(v)))
    except (RuntimeError, NotImplementedError) as error:
        return "raises", _short(error)

    (u, hu), *others = products
    floor = 1e-6 * float(g.detach().norm() * u.norm()) / max(1, len(u)) ** 0.5
    gaps = []
    for v, hv in others:
        taken = float(hu @ v)
        gap = abs(taken - float(u @ hv))
        if gap > max(ASYMMETRY.get(g.dtype, 1e-2) * float(hu.norm() * v.norm()), floor):
            return "asymmetric", ""
        if g.dtype != torch.float64:
            continue  # differences would be all rounding
        step = [d.view_as(t) * STEP for d, t in zip(v.split(sizes), start, strict=True)]
        ahead, behind = (
            gradient([(t + sign * d).requires_grad_() for t, d in zip(start, step, strict=True)]).detach()
            for sign in (1, -1)
        )
        true = float((ahead - behind) @ u) / (2 * STEP)
        gaps.append((abs(true - taken) > max(DIFFERENCE * max(abs(true), abs(taken)), floor), taken, true))
    if gaps and all(far for far, _, _ in gaps):
        _, taken, true = gaps[0]
        return "wrong", f"autograd gives {taken:.2g} where differences of the gradient give {true:.2g}"
    return "fine", ""


def _differentiable(output: Any) -> bool:
    return isinstance(output, Tensor) and output.requires_grad


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


# Where in the model something happens.


@dataclass(frozen=True)
class _Step:
    """What a module gave in a forward pass; `version` counts the in-place writes to `output` so far."""

    label: str
    output: Tensor
    version: int
    value: Tensor


@torch.no_grad()
def _steps(model: nn.Module, x: Tensor) -> list[_Step]:
    """The modules in the order in which they finish, inner before outer."""
    steps: list[_Step] = []

    def record(label: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = next((t for t in _flat(output) if isinstance(t, Tensor)), None)
            if first is not None:
                steps.append(_Step(label, first, first._version, first.clone()))

        return hook

    handles = [module.register_forward_hook(record(_label(name, module))) for name, module in model.named_modules()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return steps


def _flat(output: Any) -> Iterator[Any]:
    values = output.values() if isinstance(output, dict) else output
    if isinstance(output, (tuple, list, dict)):
        for value in values:
            yield from _flat(value)
    else:
        yield output


class _Places:
    """Inside, notes when each module runs; autograd numbers its nodes in the order of their making."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.spans: list[tuple[int, int, str]] = []
        self.handles: list[Any] = []

    def __enter__(self) -> _Places:
        open_spans: list[int] = []

        def close(label: str) -> Any:
            return lambda module, args, output: self.spans.append((open_spans.pop(), _clock(), label))

        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_pre_hook(lambda module, args: open_spans.append(_clock())))
            self.handles.append(module.register_forward_hook(close(_label(name, module))))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def owner(self, node: Any) -> str:
        """The innermost module in whose forward pass the node was made."""
        number = node._sequence_nr()
        around = [(end - start, label) for start, end, label in self.spans if start < number < end]
        return min(around)[1] if around else "the loss"


def _clock() -> int:
    """The number of a node made now."""
    with torch.enable_grad():  # checkpointing switches it off
        node = torch.zeros((), requires_grad=True).clone().grad_fn
    return node._sequence_nr()  # type: ignore[union-attr]


def _nodes(loss: Tensor) -> Iterator[Any]:
    """Every node of the graph behind `loss`."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo.extend(following for following, _ in node.next_functions)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return True
    if not a.is_floating_point():
        return not torch.equal(a, b)
    return not bool((a - b).abs().amax() <= tolerance * a.abs().amax()) if a.numel() else False


def _label(name: str, module: nn.Module) -> str:
    return f"'{name or '(model)'}' ({type(module).__name__})"


def _others(found: list[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120].rstrip('.')}" if lines else type(error).__name__


# What it will cost.


def forecast_measurements(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | Loss = "cross_entropy",
    n_data: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Time and memory of the usual measurements, from timings on few of the images and linear in their number.

    Args:
        batches: as for `diagnose`; at most `FORECAST_IMAGES` of them are used.
        n_data: images to forecast for; None for as many as there are in `batches`.

    Returns:
        measurement, seconds, peak MB: memory for tensors beside the data, weights included.  The exact trace's row is
        NaN where it does not hold.
    """
    function = _loss(loss)
    where = torch.device(device) if device is not None else model_device(model)
    data = [(x.to(where), y.to(where)) for x, y in as_batches(batches)]
    n_data = n_data or sum(len(x) for x, _ in data)
    x, y = (part[:FORECAST_IMAGES] for part in data[0])
    few = len(x)
    view = take_view(model, "dequantized").to(where)
    own = variables(view)
    at_once = min(n_data, max(1, min(LARGEST, INPUT_SCALARS // max(1, x[0].numel()))))
    rows: list[tuple[str, float, float]] = []
    with _same_random_state(where):

        def exact() -> object:
            return list(per_sample_traces(view, [(x, y)], own))

        try:
            if function is not F.cross_entropy:
                raise NotExactError("the loss is another")
            certify(view, [(x, y)], own, seed)
            seconds, peak = _measure(exact, where)
        except NotExactError:
            seconds = peak = float("nan")
        rows.append(("trace (exact)", seconds * n_data / few, peak * max(1.0, at_once / few)))

        vector = torch.randn(sum(p.numel() for p in own.values()), generator=torch.Generator().manual_seed(seed))
        vector = vector.to(next(iter(own.values())))
        seconds, peak = _measure(lambda: HessianOperator(view, function, [(x, y)], own).matvec(vector), where)
        again = HessianOperator(view, function, [(x, y)], own)
        again.matvec(vector)
        # With a single micro-batch the graph is built once; with several, for every product.
        each = _seconds(lambda: again.matvec(vector), where) if at_once == n_data else seconds
        for name, products in (
            ("one Hessian-vector product", 1),
            (f"top-5 eigenvalues (about {EIGENVALUE_PRODUCTS} products)", EIGENVALUE_PRODUCTS),
            (f"density (about {DENSITY_PRODUCTS} products)", DENSITY_PRODUCTS),
        ):
            time_taken = (seconds + (products - 1) * each) * n_data / few
            # Lanczos keeps its vectors, for reorthogonalisation.
            basis = (products - 1) * vector.numel() * vector.element_size()
            rows.append((name, time_taken, peak * max(1.0, at_once / few) + basis))
    frame = pd.DataFrame(rows, columns=["measurement", "seconds", "peak MB"])
    frame["peak MB"] /= 2**20
    return frame


def _no_forecast() -> pd.DataFrame:
    return pd.DataFrame(columns=["measurement", "seconds", "peak MB"])


def _seconds(task: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _measure(task: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of a warm call, and bytes of tensors at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        task()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        with _Memory() as memory:
            task()
        peak = memory.peak
    return min(_seconds(task, device) for _ in range(2)), float(peak)


class _Memory(TorchDispatchMode):
    """Counts the bytes of the tensors alive, for devices that do not count themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for t in _flat(output):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return output

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
