"""What the tables call the quantities of records, in words."""

from __future__ import annotations

import math

from fpq_analysis.measures import MEASURES

# Quantities that are not results of their own: settings, parts of others, and noise of other sizes than one step.
NOT_RESULTS = (
    r"(nodes|weights|residual)_\d+|clipped_fraction|channels|eps|size|odd_.*"
    r"|(predicted|linear|surrogate|real|ratio_\w+)_(?!1$)[\d.].*"
)
# In the order of columns; those with (%) are shares.
HEADINGS = {
    "trace": "Trace",
    "squares": "Sum of squared eigenvalues",
    "grad_norm_minibatch": "Of minibatches, mean",
    "grad_norm": "Of the whole sample",
    "grad_norm_bias": "Its bias by sampling",
    "logit_variance": "Of the logits",
    "probability_variance": "Of the probabilities",
    "near": "Near a threshold (%)",
    "flipped": "Flipped (%)",
    "flipped_near": "Of the flipped, near (%)",
    "flipped_step": "Flipped by the step size (%)",
    "mean_shift": "Mean shift",
    "decorrelation": "1 − correlation",
    "wasserstein": "Wasserstein distance",
    "constant_channels": "Constant channels",
    "scaled_trace": "Scaled trace",
    "sam_one_step": "Rise by SAM's step",
    "sam_adaptive": "Rise by ASAM's step",
    "average_case": "Rise by a random move",
    "half_step_mean": "Rise by half a step, mean",
    "half_step_worst": "Rise by half a step, along the gradient",
    "bit_flip_mean": "Rise by a flipped bit, mean",
    "bit_flip_worst": "Rise by a flipped bit, worst",
    "predicted_1": "Predicted rise",
    "linear_1": "Rise, linear logits",
    "surrogate_1": "Rise, straight-through",
    "real_1": "Rise, real",
    "ratio_linear_1": "Linear to predicted",
    "ratio_surrogate_1": "Straight-through to predicted",
    "ratio_real_1": "Real to predicted",
    "interaction_surrogate": "Interaction of layers, straight-through",
    "interaction_real": "Interaction of layers, real",
    "holds_surrogate": "Within the error up to (steps), straight-through",
    "holds_real": "Within the error up to (steps), real",
    "within_10_surrogate": "Within 10 % up to (steps), straight-through",
    "within_10_real": "Within 10 % up to (steps), real",
}
# What stands behind an @: by probe, its heading and its words.
PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "gradnorm": ("Noise in", {"clean": "nothing", "features": "features", "weights": "weights"}),
    "output_variance": ("Noise sd", {}),
}


def title(probe: str) -> str:
    """What a probe's table is called."""
    return MEASURES[probe].title if probe in MEASURES else probe.replace("_", " ").capitalize()


def heading(probe: str, quantity: str) -> str:
    """The heading of a quantity's column; of one that is not known, its name with spaces."""
    own = MEASURES[probe].headings if probe in MEASURES else {}
    return HEADINGS.get(quantity) or own.get(quantity) or quantity.replace("_", " ").capitalize()


def order(quantity: str) -> int:
    """Sorts columns; those that are not known come last, as they are."""
    return list(HEADINGS).index(quantity) if quantity in HEADINGS else len(HEADINGS)


def is_share(probe: str, quantity: str) -> bool:
    """Whether a column is in per cent."""
    return heading(probe, quantity).endswith("(%)")


def place_heading(probe: str) -> str:
    """The heading of the column of what stands behind an @."""
    return PLACES.get(probe, ("At", {}))[0]


def place(probe: str, at: str) -> str:
    """What stands behind an @, in words."""
    return PLACES.get(probe, ("At", {}))[1].get(at, at)


def place_order(probe: str, at: str) -> tuple[float, str]:
    """Sorts these: numbers by size, words as the table lists them."""
    words = list(PLACES.get(probe, ("At", {}))[1])
    try:
        return float(at), ""
    except ValueError:
        return (words.index(at) if at in words else math.inf), at
