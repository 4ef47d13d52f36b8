"""The checks: of what can be read off the model, and of what shows when it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fpq_analysis.curvature import HessianOperator, NotExactError, certify, check_samples_apart, repeatable
from fpq_analysis.curvature.batches import full_precision
from fpq_analysis.curvature.exact import exact_passes
from fpq_analysis.curvature.steps import differ, label, watch
from fpq_analysis.doctor.functions import ASYMMETRY, COARSE, REPORTS, check_functions, report
from fpq_analysis.doctor.model_under_test import FAULT, NOTE, OK, Finding, ModelUnderTest, first, nodes, owner, short
from fpq_analysis.errors import UnfitError, UserError
from fpq_analysis.losses import check_mean
from fpq_analysis.nests import Nest, leaves, size, take
from fpq_analysis.probes.fit import examine
from fpq_analysis.quantizers import (
    clipped_fraction,
    live_observer,
    other_quantizers,
    quantizers,
    rounded_weight,
    variables,
)
from fpq_analysis.quantizers.others import DISABLE, DISAGREES, LATENT

MUCH_CLIPPED = 0.05
UNSET = ("step_size", ".input_quantizer.alpha")  # scales, by the ends of their names
REPEAT = 1e-4  # relative disagreement of two gradients beyond the order in which a device adds
# By a part of the operation's name, what to do where autograd has no second derivative.
CURES = {
    "attention": "Measure inside `with sdpa_kernel(SDPBackend.MATH):`, both from torch.nn.attention.",
    "cudnn_rnn": "Measure inside `with torch.backends.cudnn.flags(enabled=False):`.",
    "": "Write it in plain operations, as F.relu6(x + 3) / 6 is for hardsigmoid.",
}


def _mode(model: nn.Module) -> Finding:
    def minds(module: nn.Module) -> bool:
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            return module.dropout > 0
        return isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0)

    found = [label(name, m) for name, m in model.named_modules() if m.training and minds(m)]
    if not found:
        return Finding(OK, f"The model is in {'training mode, but no layer minds' if model.training else 'eval mode'}.")
    text = f"{first(found)} is in training mode, so it draws random numbers or normalises over the batch."
    return Finding(FAULT, text, "Call model.eval() before measuring.")


def weights(state: Mapping[str, Tensor], may_be_infinite: Collection[str] = ()) -> Finding:
    """Are all tensors of a state dict finite?  Scales that were never set are left to the row `quantizers`."""
    bad = []
    for name, t in state.items():
        wrong = t.isnan() if name in may_be_infinite else ~t.isfinite()
        if bool(wrong.any()) and not name.endswith(UNSET):
            bad.append(f"'{name}'")
    if not bad:
        return Finding(OK, f"All of the {len(state)} tensors are finite.")
    cure = "The training diverged: use an earlier epoch, or train again with a smaller learning rate."
    return Finding(FAULT, f"{first(bad)} holds NaN or infinity.", cure)


def _variables(model: nn.Module) -> Finding:
    own = variables(model)
    if not own:
        text = "No parameter is trainable, so the Hessian is empty."
        return Finding(FAULT, text, "Set requires_grad on those to be measured.")
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(f"'{name}'")
    tied = [" and ".join(same) for same in names.values() if len(same) > 1]
    if tied:
        text = f"{first(tied)} are one tensor, which counts once in the Hessian."
        return Finding(NOTE, text, "Nothing to do if it is meant; the exact trace needs untied weights.")
    return Finding(OK, f"The Hessian is that of {sum(p.numel() for p in own.values()):,} weights.")


def _dtype(model: nn.Module) -> Finding:
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in variables(model).values()})
    if kinds in (["float32"], ["float64"], []):
        return Finding(OK, f"The weights are {''.join(kinds)}.")
    wide = "float64" if "float64" in kinds else "float32"
    text = f"The weights are {' and '.join(kinds)}, and are measured in {wide}: a value next to a rounding threshold"
    return Finding(NOTE, f"{text} may round otherwise.", "Use model.float().")


def _quantizers(model: nn.Module) -> Finding:
    observer = live_observer(model)
    if observer:
        text = f"The fake quantizer '{observer}' still observes: each forward pass moves its scale."
        return Finding(FAULT, text, f"Call {DISABLE}.")
    others = [f"'{name}', of {package}" for name, _, package in other_quantizers(model)]
    if others:
        return Finding(NOTE, f"There are quantizers of another package: {first(others)}.", LATENT)
    found = list(quantizers(model))
    if not found:
        return Finding(OK, "The model has no quantizers of this package.")
    unset = [f"'{name}'" for name, quantizer, _ in found if bool(quantizer.step_size.isnan().any())]
    if unset:
        text = f"The quantizer of {first(unset)} was never calibrated, so its output is NaN."
        return Finding(FAULT, text, "Call fpq_analysis.calibrate(model, images, 'mse'), or load a trained state.")
    share = clipped_fraction(model)
    text = f"All of the {len(found)} quantizers are calibrated; {share:.1%} of the quantized weights are clipped."
    if share > MUCH_CLIPPED:
        return Finding(NOTE, text, "Prefer the definition 'dequantized': in 'latent', clipped weights look flat.")
    return Finding(OK, text)


def _tf32(tested: ModelUnderTest) -> Finding:
    backends: Any = torch.backends  # typed in part only
    places = {"matrix products": backends.cuda.matmul, "convolutions": backends.cudnn.conv}
    found = [name for name, place in places.items() if place.fp32_precision == "tf32"]
    if tested.device.type != "cuda" or not found:
        return Finding(OK, f"TF32 is off, or not for this device ({tested.device.type}).")
    text = f"TF32 is on for {' and '.join(found)}, which rounds what is multiplied to three digits."
    return Finding(NOTE, text, "Measurements switch it off; in code of your own, set fp32_precision = 'ieee'.")


def _finite(tested: ModelUnderTest) -> Finding:
    for x, y in tested.data:
        if not all(bool(t.isfinite().all()) for t in leaves(x)):
            return Finding(FAULT, "The inputs hold NaN or infinity.", "Check the images and their normalisation.")
        try:
            with torch.no_grad():
                value = _loss(tested, x, y)
        except UnfitError:
            raise
        except Exception as error:  # the user's code: anything can happen
            cure = "Check the shapes, and that targets are class numbers from 0 to C - 1; or give another loss."
            return Finding(FAULT, f"The loss cannot be computed on these data ({short(error)}).", cure)
        if value - value != 0:  # NaN or infinity
            bad = [step.label for step in tested.steps(x) if not bool(step.value.isfinite().all())]
            where = f"; {bad[0]} is the first whose output is not" if bad else ""
            return Finding(FAULT, f"The loss is not finite{where}.", "Check the inputs' scale, or use model.double().")
    bad = [f"'{name}'" for name, g in tested.gradients().items() if g is not None and not bool(g.isfinite().all())]
    if bad:
        text = f"The gradient of {first(bad)} is not finite, though the loss is."
        return Finding(FAULT, text, "Look for sqrt, log, norm or a division at zero; add a small constant inside.")
    return Finding(OK, "The loss and its gradient are finite.")


def _loss(tested: ModelUnderTest, x: Nest, y: Nest) -> float:
    z = tested.model(x)
    # On CUDA, cross-entropy answers a class that is not there with an error that ends the process.
    if tested.loss.check is not None:
        tested.loss.check(z, y)
    return float(tested.loss(z, y))


def _used(tested: ModelUnderTest) -> Finding:
    gradients = tested.gradients()
    unused = [f"'{name}'" for name, g in gradients.items() if g is None]
    if unused:
        text = f"The loss does not use {first(unused)}: rows of zeros in the Hessian."
        return Finding(NOTE, text, "Nothing to do; set requires_grad_(False) on it to leave it out.")
    still = [f"'{name}'" for name, g in gradients.items() if not bool(g.any())]  # type: ignore[union-attr]
    if still:
        text = f"The gradient of {first(still)} is zero, on {size(tested.few[0])} samples."
        cure = "If it is rounded, let gradients pass straight through; else it is behind zeros, or units that are dead."
        return Finding(NOTE, text, cure)
    return Finding(OK, "The loss uses every weight.")


def _repeatable(tested: ModelUnderTest) -> Finding:
    repeatable(tested.model, tested.data[0][0])
    pairs = zip(tested.gradients().items(), tested.gradients().values(), strict=True)
    far = [f"'{name}'" for (name, a), b in pairs if a is not None and b is not None and differ(a, b, REPEAT)]
    if far:
        text = f"Two gradients of {first(far)} differ, though the forward passes agree."
        return Finding(FAULT, text, "Look for random numbers in a backward pass or a backward hook.")
    return Finding(OK, "Two forward passes agree, and so do two gradients.")


def _samples_apart(tested: ModelUnderTest) -> Finding:
    check_samples_apart(tested.model, tested.data)
    return Finding(OK, "Each image's output depends on that image alone.")


def _mean_loss(tested: ModelUnderTest) -> Finding:
    for x, y in tested.data if tested.loss.check is None else []:
        with torch.no_grad():
            z = tested.model(x)
        check_mean(tested.loss, z, y)
    return Finding(OK, "The loss of a batch is the mean of its samples' losses.")


def _fit(tested: ModelUnderTest) -> Finding:
    fit = examine(tested.model, tested.data, tested.loss)
    text = f"The mean loss is {fit.loss:.3g}"
    text += "" if math.isnan(fit.accuracy) else f", the accuracy {fit.accuracy:.1%}"
    if tested.loss.name == "cross_entropy" and _are_probabilities(tested):
        cure = "Return what goes into the softmax, unless the network was trained so."
        return Finding(NOTE, f"{text}. Outputs are probabilities already, and this loss takes their softmax.", cure)
    if not (fit.at_chance or fit.above_guessing):
        return Finding(OK, f"{text}.")
    guess = f"{text}; guessing gives "
    guess += f"{fit.chance:.1%}." if fit.at_chance else f"a loss of {fit.guess:.3g}."
    return Finding(NOTE, guess, "If it is trained, check the scale of the inputs and the order of the classes.")


@torch.no_grad()
def _are_probabilities(tested: ModelUnderTest) -> bool:
    z = tested.model(tested.few[0])
    return z.shape[1] > 1 and bool((z >= 0).all()) and bool(((z.sum(1) - 1).abs() < 1e-4).all())


def _rounding(tested: ModelUnderTest) -> Finding:
    name = rounded_weight(tested.model, take(tested.few[0], slice(2)))
    if not name:
        return Finding(OK, "No weight is rounded by anything but quantizers of this package.")
    return Finding(NOTE, f"'{name}' {DISAGREES}.", LATENT)


def _in_place(tested: ModelUnderTest) -> Finding:
    steps = tested.steps(tested.few[0])
    # A layer that works in place gives its input back: what it overwrote is the output of the layer before.
    overwritten = [i for i, step in enumerate(steps) if step.output._version != step.version]
    if not overwritten:
        return Finding(OK, "No layer's output is overwritten after the hooks on it have run.")
    i, place = overwritten[0], steps[overwritten[0]].output.untyped_storage().data_ptr()
    later = (s for s in steps[i + 1 :] if s.version > steps[i].version)
    by = next((s.label for s in later if s.output.untyped_storage().data_ptr() == place), "a later operation")
    outputs = first([steps[i].label for i in overwritten])
    text = f"{by} overwrites the output of {outputs}, so a forward hook that keeps it will find other values there."
    return Finding(NOTE, text, "Build the activation with inplace=False, or keep output.clone() in the hook.")


def _twice(tested: ModelUnderTest) -> Finding:
    found = _differentiate_twice(tested)
    if found.status == FAULT:
        with full_precision():
            if _differentiate_twice(tested).status == OK:
                return Finding(NOTE, found.finding, f"Measurements here see to it; in code of your own: {found.cure}")
    return found


def _differentiate_twice(tested: ModelUnderTest) -> Finding:
    loss, steps = watch(tested.model, tested.few_loss)
    graph, own = nodes(loss), list(tested.variables.values())
    try:
        gradients = torch.autograd.grad(loss, own, create_graph=True, allow_unused=True)
        curved = [g for g in gradients if g is not None and g.requires_grad]
        if curved:
            torch.autograd.grad(curved, own, [tested.random(g) for g in curved], allow_unused=True)
        return Finding(OK, "The loss can be differentiated twice.")
    except RuntimeError as error:
        message = short(error)
    stopped = [verdict for verdict in check_functions(tested.precise) if verdict.status == "raises"]
    if stopped:
        return report(stopped)
    # Autograd names the operation; `aten::_some_op_backward` belongs to the node `SomeOpBackward0`.
    named = re.search(r"(?:aten::)?_*(\w+?)_backward\b", message)
    if not named:
        return Finding(FAULT, f"The model has no second derivative ({message}).", "Use plain operations throughout.")
    operation = named[1]
    pattern = re.compile(operation.replace("_", "") + r"Backward\d*", re.IGNORECASE)
    owners = [owner(steps, node) for node in graph if pattern.fullmatch(node.name())] or ["The model"]
    what = f"fused attention ('{operation}')" if "attention" in operation else f"'{operation}'"
    cure = next(cure for part, cure in CURES.items() if part in operation)
    return Finding(FAULT, f"{first(owners)} uses {what}, which has no second derivative.", cure)


def _symmetric(tested: ModelUnderTest) -> Finding:
    exact = tested.precise
    operator = HessianOperator(exact.model, exact.loss, exact.data, exact.variables)
    both = tested.random(torch.zeros(2, operator.size, dtype=operator.dtype, device=operator.device))
    try:
        (u, v), (hu, hv) = both, operator.products(both)
    except (RuntimeError, UserError):
        return Finding(NOTE, "Not checked, as there is no second derivative.")
    scale = float(hu.norm() * v.norm() + hv.norm() * u.norm()) / len(u) ** 0.5  # what the lengths alone would give
    gap = float((u @ hv - v @ hu).abs()) / (scale or 1.0)
    if gap <= ASYMMETRY.get(operator.dtype, COARSE):
        return Finding(OK, f"The Hessian is symmetric: u.Hv and v.Hu differ by {gap:.0e} ({operator.dtype}).")
    text = f"The Hessian is not symmetric: u.Hv and v.Hu differ by {gap:.0e}"
    for kind in ("asymmetric", "wrong"):
        culprits = [v.label for v in check_functions(exact) if v.status == kind]
        if culprits:
            return Finding(FAULT, f"{text}, through the backward of {first(culprits)}.", REPORTS[kind].cure)
    return Finding(FAULT, f"{text}.", "Look for a backward hook, or a gradient that is not that of the forward.")


def _exact_trace(tested: ModelUnderTest) -> Finding:
    try:
        exact_passes(tested.model, tested.loss, tested.data[0])
        certify(tested.model, tested.data, tested.variables)
        return Finding(OK, "The exact trace holds: the outputs are piecewise linear in every weight.")
    except NotExactError as outside:
        # The check differentiates twice itself, though the exact trace does not.
        cure = "Mend that first." if outside.__cause__ else "Use method='auto': the deflated estimator, with its error."
        return Finding(NOTE, f"The exact trace does not hold: {outside}.", cure)


# Read off the model; a fault beside `mode` ends the examination.
STANDING: dict[str, Callable[[nn.Module], Finding]] = {
    "mode": _mode,
    "weights": lambda model: weights(model.state_dict(), dict(model.named_buffers())),
    "variables": _variables,
    "dtype": _dtype,
    "quantizers": _quantizers,
}
# With the model running.
RUNNING: dict[str, Callable[[ModelUnderTest], Finding]] = {
    "TF32": _tf32,
    "finite": _finite,
    "used": _used,
    "repeatable": _repeatable,
    "samples apart": _samples_apart,
    "mean loss": _mean_loss,
    "fit": _fit,
    "rounding": _rounding,
    "in place": _in_place,
    "Functions": lambda tested: report(check_functions(tested.precise)),
    "differentiable twice": _twice,
    "symmetric": _symmetric,
    "exact trace": _exact_trace,
}
ESSENTIAL = ("finite", "repeatable")  # a fault here makes the rest meaningless
AS_FOUND = ("TF32", "differentiable twice")  # with the user's settings; the others with those of measurements
