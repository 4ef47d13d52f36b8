"""Confidence intervals: Student's for means, Wilson's and Newcombe's for proportions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

Z95 = 1.96  # half of the normal 95 % interval, in standard errors


def half_interval(sem: float, dof: float, level: float = 0.95) -> float:
    """Half of the two-sided Student interval at `level`, from a standard error with `dof` degrees of freedom."""
    return float(stdtrit(dof, (1 + level) / 2)) * sem if sem else 0.0


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values, and half of its 95 % Student interval."""
    sem = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half_interval(sem, len(values) - 1)


def wilson(p: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion `p` of `n` (Wilson 1927)."""
    centre, half = p + Z95**2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return (centre - half) / (1 + Z95**2 / n), (centre + half) / (1 + Z95**2 / n)


def newcombe(p: float, q: float, n: int) -> tuple[float, float]:
    """The 95 % interval of p - q, proportions of `n` each and independent (Newcombe 1998, method 10).

    It stays right near 100 %, where the normal interval shrinks to nothing.  Two networks that err on the same images
    are not independent; for them it is too wide.
    """
    (p_low, p_high), (q_low, q_high) = wilson(p, n), wilson(q, n)
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)
