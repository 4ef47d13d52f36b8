"""The methods paragraphs, made from run.json and the records: they say what was done, and no more."""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter

import pandas as pd

from fpq_analysis.measures import MEASURES
from fpq_analysis.methods import METHODS, method_label
from fpq_analysis.plots.names import title
from fpq_analysis.records.queries import eigenvalues, mean_loss, samples_of, totals
from fpq_analysis.report.study import Study, seeds_in_words
from fpq_analysis.runs import Run
from fpq_analysis.text import listed

# What each definition of the Hessian means; docs/definitions.md says the same.
DEFINITIONS = {
    "dequantized": (
        "The variables are Q(w), the weights that the quantized network computes with. It is the curvature of the "
        "loss where the quantized network stands."
    ),
    "latent": (
        "The variables are the trained weights w behind Q(w). Weights outside their quantizer's grid drop out, so a "
        "method that clips more looks flatter: read it with the clipped fraction."
    ),
    "float": "The variables are the trained weights w, with all quantizers taken off: the full-precision shadow.",
}
VARIABLES = {
    "dequantized": "the dequantized weights, which the quantized network computes with",
    "latent": "the latent weights behind the quantizers (clipped weights have no curvature)",
    "float": "the latent weights with all quantizers removed",
}
ESTIMATORS = {
    "exact": (
        "computed exactly, without random probes: these networks are piecewise linear in every single parameter, so "
        "that the trace is a sum over samples and classes of squared gradient norms"
    ),
    "sampled": (
        "estimated without bias from squared gradient norms of single samples at labels drawn from the network's own "
        "prediction"
    ),
    "deflated": "estimated by Hutchinson's method with a Krylov subspace taken out exactly",
    "hutchinson": "estimated by Hutchinson's method with random signs",
    "hutch++": "estimated by Hutch++",
    "xtrace": "estimated by XTrace",
    "xnystrace": "estimated by XNysTrace",
    "pyhessian": "estimated by Hutchinson's method as in PyHessian",
}
CALIBRATIONS = {"mse": "a search for the least squared error", "minmax": "the range of the values"}


def methods(study: Study) -> list[str]:
    """The paragraphs of a methods section: training, measurements, software."""
    paragraphs = [_data(study), _training(study)]
    paragraphs += [SENTENCES.get(probe, _other)(study.records(probe)) for probe in _in_order(study.probes)]
    return [*filter(None, paragraphs), _software(study)]


def _in_order(probes: list[str]) -> list[str]:
    known = [probe for probe in SENTENCES if probe in probes]
    return known + [probe for probe in probes if probe not in known]


def _settings(runs: list[Run], key: str) -> str:
    """A setting of some runs, in words: `0.1`, or `0.1 or 0.3`."""
    values = sorted({run.config.get(key) for run in runs}, key=lambda value: (str(type(value)), value))
    return listed((f"{v:g}" if isinstance(v, float) else v for v in values), "or")


def _data(study: Study) -> str:
    parts = []
    for name in dict.fromkeys(run.dataset for run in study.runs):
        about = next(run.data for run in study.runs if run.dataset == name)
        facts = [
            f"{about[key]:,} {what}" for key, what in (("n_train", "training"), ("n_test", "test")) if key in about
        ]
        size = about.get("size")
        shape = f" of {size} × {size} pixels" if size else ""
        classes = f" in {len(about['classes'])} classes" if about.get("classes") else ""
        parts.append(title(name) + (f" ({listed(facts)} images{shape}{classes})" if facts else ""))
    models = listed(title(run.model) for run in study.runs)
    return f"The data were {listed(parts)}; the network{'s were' if ' and ' in models else ' was'} {models}."


def _training(study: Study) -> str:
    ours = [run for run in study.runs if "epochs" in run.config]  # of others the records say nothing of training
    floats = [run for run in ours if run.bits == "FP"]
    quantized = [run for run in ours if run.bits != "FP"]
    sentences = []
    if len(ours) < len(study.runs):
        others = [run.name for run in study.runs if run not in ours]
        which = listed(others) if ours else "the networks"
        sentences.append(f"How {which} {'was' if which in others else 'were'} trained is not on record")
    if floats:
        sentences.append(f"Float networks were trained {_optimizer(floats)}")
    if quantized:
        names = listed(method_label(run.method) for run in quantized)
        bits = listed(run.bits for run in quantized)
        sentences.append(
            f"Quantized networks ({names} at {bits}: bits of weights and inputs, the first and the last layer at 8 "
            f"bits) started from the trained float network and were trained {_optimizer(quantized)}"
        )
        for method in dict.fromkeys(run.method for run in quantized):
            here = [run for run in quantized if run.method == method]
            if method in METHODS and (sentence := METHODS[method].sentence):
                keys = [key for _, key, _, _ in Formatter().parse(sentence) if key]
                sentences.append(sentence.format(**{key: _settings(here, key) for key in keys}))
        values = {CALIBRATIONS.get(str(run.config.get("act_calibration")), "") for run in quantized}
        if len(values) == 1 and (how := values.pop()):
            images = _settings(quantized, "calibration_images")
            sentences.append(f"The first step sizes of the inputs come from {how} on {images} training images")
    if any(run.seed is not None for run in study.runs):
        several = len({run.seed for run in study.runs}) > 1
        sentences.append(f"Training seed{'s' if several else ''}: {seeds_in_words(study.runs)}")
    return ". ".join(sentences) + "."


def _optimizer(runs: list[Run]) -> str:
    augment = {bool(run.config.get("augment")) for run in runs}
    images = "on randomly cropped images (mirrored at random where the data allow it)"
    if augment == {False}:
        images = "without augmentation"
    elif len(augment) > 1:
        images = "with and without augmentation"
    one = _settings(runs, "epochs")
    return (
        f"for {one} epoch{'' if one == '1' else 's'} by stochastic gradient descent (momentum "
        f"{_settings(runs, 'momentum')}, weight decay {_settings(runs, 'weight_decay')}, batches of "
        f"{_settings(runs, 'batch_size')}), with a learning rate of {_settings(runs, 'lr')} annealed to zero by a "
        f"cosine, {images}"
    )


def _sample(rows: pd.DataFrame) -> str:
    n = listed((f"{int(x):,}" for x in sorted(rows["n_data"].dropna().unique())), "or")
    seeds = listed(sorted(rows["seed"].unique()))
    return f"{n} {samples_of(rows)} (drawn once by seed {seeds}, the same for every checkpoint; no augmentation)"


def _variables(rows: pd.DataFrame) -> str:
    found = [VARIABLES.get(name, name) for name in dict.fromkeys(rows["definition"].dropna())]
    if set(rows["bits"]) == {"FP"} and "latent" not in set(rows["definition"]):  # rounded by other code than ours
        return "all weights"
    return "; and, apart, ".join(found)


def _trace(frame: pd.DataFrame) -> str:
    rows = totals(frame)
    if rows.empty:
        return ""
    how = listed(ESTIMATORS.get(name, f"estimated by {name}") for name in rows["estimator"])
    n = rows["checkpoint"].nunique()
    sentences = [
        f"We measured the trace of the Hessian of the {mean_loss(rows)} at {n} checkpoint{'s' if n > 1 else ''}, with "
        f"respect to {_variables(rows)}, and to biases and BatchNorm parameters; step sizes were not among the "
        "variables, and activation quantizers acted through their straight-through derivative. BatchNorm was in "
        f"evaluation mode, the arithmetic in float32, and the loss that of {_sample(rows)}. The trace was {how}."
    ]
    if rows["sem_data"].notna().any():
        sentences.append(
            "Intervals are 95 % intervals over the samples, not over training runs; two networks were compared sample "
            "by sample, so that what the samples have in common cancels."
        )
    if rows["sem_data"].isna().any():
        sentences.append("Where single samples are not seen, intervals are over the random probes.")
    return " ".join(sentences)


def _eigenvalues(frame: pd.DataFrame) -> str:
    rows = eigenvalues(frame)
    if rows.empty:
        return ""
    residuals = frame[frame["quantity"].str.startswith("residual_")]
    residuals = residuals.assign(quantity=residuals["quantity"].str.replace("residual_", "eigenvalue_"))
    pairs = rows.merge(residuals[["key", "quantity", "value"]], on=["key", "quantity"], suffixes=("", "_residual"))
    worst = (pairs["value_residual"] / pairs["value"].abs()).max()
    kinds = {"LA": "largest", "SA": "smallest", "LM": "largest in magnitude"}
    which = {str(name).partition(",")[0].split()[-1] for name in rows["estimator"]}
    return (
        f"The {rows['rank'].max()} {listed(sorted(kinds.get(name, name) for name in which))} eigenvalues of the "
        f"Hessian of the {mean_loss(rows)} with respect to {_variables(rows)}, on {_sample(rows)}, were computed by "
        f"Lanczos' method with full reorthogonalization (largest relative residual {worst:.2g}); they carry no error "
        "over the data."
    )


def _density(frame: pd.DataFrame) -> str:
    nodes = frame[frame["quantity"].str.startswith("nodes_") & frame["samples"].notna()]
    if nodes.empty:
        return ""
    runs = nodes.groupby("key").size().max()
    steps = nodes["samples"].map(len).max()
    return (
        f"The spectral density of the Hessian of the {mean_loss(nodes)} was estimated by stochastic Lanczos quadrature "
        f"with {runs} random vectors of {steps} steps each, with respect to {_variables(nodes)}, on {_sample(nodes)}."
    )


def _sharpness(frame: pd.DataFrame) -> str:
    return (
        f"Sharpness measures that do not change when layers are rescaled were measured on {_sample(frame)}, as changes "
        f"of the {mean_loss(frame)} under moves relative to {_variables(frame)}."
    )


def _other(frame: pd.DataFrame) -> str:
    probe, n = str(frame["probe"].iloc[0]), frame["checkpoint"].nunique()
    what = MEASURES[probe].subject if probe in MEASURES else f"what the probe '{probe}' is about"
    whole = frame[frame["n_data"] == frame["n_data"].max()]  # parts may be of fewer samples
    where = f", on {_sample(whole)}" if whole["n_data"].any() else ""
    return f"We measured {what} at {n} checkpoint{'s' if n > 1 else ''}{where}."


# By probe, in the order of the text; of others it is said what they measure, with samples and seed.
SENTENCES: dict[str, Callable[[pd.DataFrame], str]] = {
    "hessian_trace": _trace,
    "hessian_eigs": _eigenvalues,
    "hessian_density": _density,
    "sharpness": _sharpness,
}


def _software(study: Study) -> str:
    names = {"fpq-analysis": "fpq-analysis", "torch": "PyTorch", "numpy": "NumPy", "python": "Python"}
    found = []
    for key, name in names.items():
        known = sorted({run.versions[key] for run in study.runs if key in run.versions})
        if known:
            found.append(f"{name} {listed(known, 'or')}")
    return f"Training used {listed(found)}." if found else ""
