"""What captions and the report call the losses of `losses/`, by the names that records hold.  Without torch."""

from __future__ import annotations

LOSS_TITLES = {
    "cross_entropy": "cross-entropy",
    "squared_error": "squared error",
    "binary_cross_entropy": "binary cross-entropy",
    "causal_lm": "cross-entropy of the next token",
    "token_classification": "cross-entropy of the tokens' classes",
    "distillation": "distillation loss",
}


def loss_title(name: str) -> str:
    """Words for a loss, with the settings that stand in its name; of one without a title, `loss` and its name."""
    base, bracket, settings = name.partition("(")
    if base not in LOSS_TITLES:
        return f"loss {name}"
    return LOSS_TITLES[base] + (f" ({settings}" if bracket else "")
