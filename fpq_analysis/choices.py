"""What measurements may be asked for: names, and settings that make sense together.

Without torch, so that a command that is misused answers before that is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fpq_analysis.errors import UserError, did_you_mean

DEFINITIONS = ("dequantized", "latent", "float")  # of a quantized network's Hessian
OPERATORS = ("hessian", "gauss-newton", "fisher")
# Of a trace: those that see samples one by one, and those of products with vectors.
BY_SAMPLE = ("exact", "sampled")
BY_PRODUCT = ("deflated", "hutchinson", "hutch++", "xtrace", "xnystrace", "pyhessian")
TRACE_METHODS = ("auto", *BY_SAMPLE, *BY_PRODUCT, "split")
N_PRODUCTS, N_LABELS = 100, 4  # of a trace
MOST_PRODUCTS = 1000  # of eigenvalues
# The networks, data sets and losses that have a name; what they are stands in `models.py`, `data/named.py` and
# `losses/table.py`.
MODELS = ("resnet18", "resnet20", "resnet50", "mobilenet_v1", "mobilenet_v2")
DATASETS = ("digits", "cifar10", "cifar100", "imagefolder")
LOSSES = (
    *("cross_entropy", "squared_error", "binary_cross_entropy"),
    *("causal_lm", "token_classification", "distillation"),
)


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise `UserError` unless `name` is one of those known."""
    names = list(known)
    if name not in names:
        raise UserError(f"Unknown {what} '{name}'{did_you_mean(name, names)}. Known: {', '.join(names)}.")


def check_definition(definition: str) -> None:
    """Raise `UserError` unless `definition` is one of `DEFINITIONS`."""
    if definition not in DEFINITIONS:
        raise UserError(
            f"Unknown definition '{definition}'{did_you_mean(definition, DEFINITIONS)} of a quantized network's "
            f"Hessian. Known: {', '.join(DEFINITIONS)}."
        )


def check_operator(operator: str) -> None:
    """Raise `UserError` unless it is one of `OPERATORS`."""
    check_known("operator", operator, OPERATORS)


def check_model_name(name: str) -> None:
    """Raise `UserError` unless `name` is one of `MODELS` or has the form `package.module:factory`."""
    if name not in MODELS and ":" not in name:
        module, _, factory = name.rpartition(".")
        meant = f" (did you mean '{module}:{factory}'?)" if module else did_you_mean(name, MODELS)
        raise UserError(
            f"Unknown model '{name}'{meant}. The built-in models are {', '.join(MODELS)}; "
            "for your own network give package.module:factory."
        )


def check_data_name(name: str) -> None:
    """Raise `UserError` unless `name` is one of `DATASETS`, or has the form of one's own data, or is there on disk."""
    if name not in DATASETS and ":" not in name and not name.endswith(".npz") and not Path(name).is_dir():
        raise unknown_data(name)


def unknown_data(name: str) -> UserError:
    """What to raise for data that are none of `DATASETS`, nor one's own."""
    return UserError(
        f"Unknown data set '{name}'{did_you_mean(name, DATASETS)}. Known: {', '.join(DATASETS)}. "
        "Your own are named package.module:function, or FILE.npz."
    )


def check_loss_name(name: str) -> None:
    """Raise `UserError` unless `name` is one of `LOSSES` or has the form `package.module:name`."""
    if name not in LOSSES and ":" not in name:
        raise UserError(
            f"Unknown loss '{name}'{did_you_mean(name, LOSSES)}. Known: {', '.join(LOSSES)}; or give a function "
            "(outputs, targets) to the mean."
        )


def check_trace(method: str, definition: str, operator: str, tol: float | None, n_products: int, n_labels: int) -> None:
    """Raise `UserError` for settings of a trace that `hessian_trace` refuses."""
    check_known("method", method, TRACE_METHODS)
    check_definition(definition)
    check_operator(operator)
    if method == "xnystrace" and operator == "hessian":
        raise UserError(
            "xnystrace is for positive semidefinite matrices, and a Hessian need not be one. Use method='xtrace', or "
            "operator='gauss-newton'."
        )
    if method == "split" and (operator != "hessian" or tol is not None):
        raise UserError("The method 'split' is for the Hessian, with a fixed number of products (n_products).")
    if method == "pyhessian" and operator != "hessian":
        raise UserError("PyHessian knows the Hessian only; leave the operator out.")
    if tol is not None and not tol > 0:
        raise UserError(f"tol is {tol}, and must be above zero (0.01 for one per cent).")
    if min(n_products, n_labels) < 2:
        raise UserError("An error needs at least 2 products (n_products) and 2 labels a sample (n_labels).")


def check_k(k: int, n_products: int = MOST_PRODUCTS) -> None:
    """Raise `UserError` unless so many eigenvalues can come of so many products."""
    if k < 1:
        raise UserError(f"k is {k}; ask for at least one eigenvalue.")
    if k > n_products:
        raise UserError(
            f"k is {k}, and each eigenvalue takes a product or more, of which at most {n_products} are made. Ask for "
            "fewer eigenvalues; how all of them are spread is what the spectral density shows (--density)."
        )
