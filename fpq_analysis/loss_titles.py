"""What captions and the report call the losses of `losses/`, by the names that records hold.  Without torch."""

from __future__ import annotations

import re

LOSS_TITLES = {
    "cross_entropy": "cross-entropy",
    "squared_error": "squared error",
    "binary_cross_entropy": "binary cross-entropy",
    "causal_lm": "cross-entropy of the next token",
    "token_classification": "cross-entropy of the tokens' classes",
    "distillation": "distillation loss",
}


MEANS = {"by_sample": "averaged within each sample", "weighted": "weighted by sample"}


def loss_title(name: str) -> str:
    """Words for a loss, with the settings that stand in its name; of one without a title, `loss` and its name."""
    terms = [re.fullmatch(r"([\d.e+-]+) ([a-z].*)", term) for term in name.split(" + ")]
    if all(terms):  # of `losses.combined`
        return " + ".join(f"{term[1]} × {loss_title(term[2])}" for term in terms if term)
    base, bracket, settings = name.partition("(")
    if base in MEANS and settings.endswith(")"):
        return f"{loss_title(settings[:-1])}, {MEANS[base]}"
    if base not in LOSS_TITLES:
        return f"loss {name}"
    return LOSS_TITLES[base] + (f" ({settings}" if bracket else "")
