"""The cross-entropy of tokens: logits (B, T, V) and labels (B, T), with -100 where there is nothing to be named."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fpq_analysis.errors import UnfitError
from fpq_analysis.losses.cross_entropy import IGNORED, CrossEntropy, cross_entropy
from fpq_analysis.losses.loss import Loss
from fpq_analysis.nests import Nest, described


@dataclass(frozen=True)
class Tokens:
    """The functions of a `Loss`, by those of the cross-entropy of positions.

    Attributes:
        shift: whether the logits of a place are those of the label at the next one.
    """

    own: CrossEntropy
    shift: bool

    def _outputs(self, outputs: Tensor) -> Tensor:
        """(B, V, T), less the last place if the labels are shifted."""
        return (outputs[:, :-1] if self.shift else outputs).movedim(-1, 1)

    def _targets(self, targets: Tensor) -> Tensor:
        return targets[:, 1:] if self.shift else targets

    def _back(self, columns: Tensor) -> Tensor:
        """From (K, B, V, T) to (K, B, T, V), with zeros for the last place."""
        columns = columns.movedim(2, -1)
        return F.pad(columns, (0, 0, 0, 1)) if self.shift else columns

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B,) sums over the places."""
        return self.own.per_sample(self._outputs(outputs), self._targets(targets))

    def factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(V - 1, B, T, V)."""
        return self._back(self.own.factor(self._outputs(outputs), self._targets(targets)))

    def draw(self, outputs: Tensor, targets: Tensor, uniforms: Tensor, balanced: bool) -> Tensor:
        """(M, B, T, V)."""
        uniforms = uniforms[:, :, :-1] if self.shift else uniforms
        return self._back(self.own.draw(self._outputs(outputs), self._targets(targets), uniforms, balanced))

    def weights(self, targets: Tensor) -> Tensor:
        """(B,): places that count."""
        if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.shape[1] <= self.shift:
            raise self._unfit(targets)
        return self.own.weights(self._targets(targets))

    def classes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels, with the classes second."""
        return self.own.classes(self._outputs(outputs), self._targets(targets))

    def check(self, outputs: Tensor, targets: Nest) -> None:
        """Raise `UnfitError` unless there is a label a token."""
        if not isinstance(targets, Tensor) or outputs.ndim != 3 or targets.shape != outputs.shape[:2]:
            raise self._unfit(targets, f"outputs are {tuple(outputs.shape)}, and ")
        self.own.check(self._outputs(outputs), self._targets(targets))

    def _unfit(self, targets: Nest, outputs: str = "") -> UnfitError:
        return UnfitError(
            "The cross-entropy of tokens wants logits (B, T, V) and one label for each of T tokens, (B, T): "
            f"{outputs}targets of {described(targets)}.",
            "Of logits with the classes second, (B, C, ...), take loss='cross_entropy'.",
        )


def tokens(shift: bool, ignore_index: int = IGNORED) -> Loss:
    """The cross-entropy over all tokens that count of all data, as the models of Hugging Face compute it of one batch.

    Args:
        shift: True for causal language models, whose labels are their inputs: the logits of a place are compared with
            the label of the next.  False for a label of each token itself.
        ignore_index: the label of tokens that do not count.
    """
    base = cross_entropy(ignore_index=ignore_index)
    own = Tokens(CrossEntropy(ignore_index=ignore_index), shift)
    name = "causal_lm" if shift else "token_classification"
    return Loss(
        base.name.replace("cross_entropy", name),
        own.per_sample,
        own.factor,
        (-1,),
        own.draw,
        own.weights,
        check=own.check,
        classes=own.classes,
        resolution=base.resolution,
    )


CAUSAL_LM, TOKEN_CLASSIFICATION = tokens(shift=True), tokens(shift=False)
