"""Is a model's output a function of the one sample alone?  What every method assumes, tried on the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.curvature.steps import first_difference, watch
from fpq_analysis.errors import UnfitError
from fpq_analysis.nests import Nest, alike, device_of, mapped, size, take

# Numbers that differ by more than so many units in the last place, of the largest of them, do so for another reason
# than the order in which a device adds.
ROUNDINGS = 100
SEEDS = (1, 2)
RANDOM = "Switch its random numbers off in eval mode, as F.dropout(x, p, training=self.training) does."
STATE = "Let it do so in training mode only (if self.training: ...)."
UNKNOWN = "Look for random numbers (NumPy's, or a generator of its own), or for a state that its forward changes."
APART = "Normalise over channels or layers (GroupNorm, LayerNorm), or by running statistics."


def tolerance(t: Tensor) -> float:
    """Relative size of what rounding explains, for numbers of the type of `t`."""
    return ROUNDINGS * torch.finfo(t.dtype).eps if t.dtype.is_floating_point else 0.0


@torch.no_grad()
def repeatable(model: nn.Module, x: Nest) -> Tensor:
    """The outputs for `x`, (B, ...), if another forward pass gives the same.

    The second pass finds PyTorch's random numbers in another state.  Where the outputs then differ by as little as a
    bit, and by no bit from those of a third pass that finds them as the second did, it is they that decide.  Anything
    else may be the order in which a device adds, up to `tolerance`.

    Raises:
        UnfitError: if it gives others, with the module where they begin to differ and what it does.
    """
    device = device_of(x)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        first, second = (_seeded(model, x, seed) for seed in SEEDS)
        if torch.equal(first, second) or not bool(first.isfinite().all()):
            return first
        random = torch.equal(second, _seeded(model, x, SEEDS[1]))
        before = {name: t.clone() for name, t in model.named_buffers()}
        steps, others = (watch(model, lambda seed=seed: _seeded(model, x, seed))[1] for seed in SEEDS)  # type: ignore[misc]
        changed = [name for name, t in model.named_buffers() if not torch.equal(t, before[name])]
    gap = float((first - second).abs().max())
    if not random and not changed and gap <= tolerance(first) * float(first.abs().max()):
        return first
    where = first_difference(steps, others, 0.0)
    finding = "The model is not deterministic: two forward passes in eval mode differ"
    finding += f", from {where} on" if where else ""
    if changed and not random:
        raise UnfitError(f"{finding}, as the forward pass changes the buffer '{changed[0]}'.", STATE)
    raise UnfitError(f"{finding}{', as it draws random numbers' if random else ''}.", RANDOM if random else UNKNOWN)


def _seeded(model: nn.Module, x: Nest, seed: int) -> Tensor:
    torch.manual_seed(seed)
    outputs = model(x)
    if not isinstance(outputs, Tensor):
        raise UnfitError(
            f"The model gives a {type(outputs).__name__}, not a tensor.",
            "Wrap it in a module that returns the outputs that the loss takes.",
        )
    return outputs


def check_samples_apart(model: nn.Module, batches: list[Batch]) -> None:
    """Raise `UnfitError` if a sample's output changes with the samples beside it."""
    x = spread(batches, 3)
    if size(x) < 2:
        return

    def copies(place: int) -> Nest:
        return mapped(lambda t: torch.empty_like(t).copy_(t[place]), x)

    with torch.no_grad(), full_precision():
        together = model(x)
        # Each image among copies of itself, at its own place in a batch of the same size: of another size, rounding
        # would differ, and behind a quantizer flip levels, which is no smaller than what mixing does.
        alone = torch.cat([model(copies(i))[i : i + 1] for i in range(size(x))])
        if not bool(torch.isfinite(alone).all()):
            return  # nothing to compare; the measurement will not be finite, and says so
        if together.shape == alone.shape and bool(
            (together - alone).abs().max() <= tolerance(alone) * alone.abs().max()
        ):
            return
        first = copies(0)
        steps = [watch(model, lambda given=given: model(given))[1] for given in (x, first)]  # type: ignore[misc]
    one = [[step._replace(value=step.value[:1]) for step in seen] for seen in steps]
    where = first_difference(one[0], one[1], tolerance(alone))
    raise UnfitError(
        f"The model's output for one sample depends on the others in its batch{f', from {where} on' if where else ''}.",
        APART,
    )


def spread(batches: list[Batch], n: int, turn: int = 0) -> Nest:
    """`n` inputs spread evenly over all batches, others each turn; repeated if there are fewer.

    Where samples are of several shapes, all are of the first one's.
    """
    inputs = [x for x, _ in batches if alike(x, batches[0][0])]
    total = sum(map(size, inputs))
    wanted = [(turn + (i * total // n if n <= total else i)) % total for i in range(n)]
    start, found = 0, {}
    for x in inputs:
        found.update({i: take(x, i - start) for i in set(wanted) if start <= i < start + size(x)})
        start += size(x)
    return mapped(lambda *rows: torch.stack(rows), *(found[i] for i in wanted))
