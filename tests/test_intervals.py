"""Intervals against scipy's distributions, closed forms, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fpq_analysis.intervals import half_interval, newcombe, over_seeds, wilson


@pytest.mark.parametrize("dof", [1, 3.7, 19, 1e6, math.inf])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_students(dof, level):
    assert half_interval(2.5, dof, level) == 2.5 * stats.t.ppf((1 + level) / 2, dof)


def test_no_error_is_no_interval():
    assert half_interval(0.0, 0) == 0


def test_over_seeds():
    mean, half = over_seeds([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1.0, 2.0, 4.0]))
    assert (mean - half, mean + half) == pytest.approx((low, high))


@pytest.mark.parametrize(("p", "q", "n"), [(0.98, 0.96, 355), (1.0, 1.0, 50), (0.3, 0.9, 20), (1.0, 0.0, 10)])
def test_intervals_of_proportions(p, q, n):
    low, high = wilson(p, n)
    theirs = stats.binomtest(round(p * n), n).proportion_ci(method="wilson")
    x = round(p * n) / n
    assert wilson(x, n) == pytest.approx((theirs.low, theirs.high), abs=2e-5)  # 1.96 is rounded
    assert 0 <= low <= p <= high <= 1
    low, high = newcombe(p, q, n)
    assert -1 <= low <= p - q <= high <= 1
    assert low < high
    assert newcombe(q, p, n) == pytest.approx((-high, -low))


def test_newcombe_against_the_published_example():
    """Newcombe 1998, Table II (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339; here both of n = 80 would differ."""
    (p_low, p_high), (q_low, q_high) = wilson(56 / 70, 70), wilson(48 / 80, 80)
    gap = 56 / 70 - 48 / 80
    assert gap - np.hypot(56 / 70 - p_low, q_high - 0.6) == pytest.approx(0.0524, abs=1e-4)
    assert gap + np.hypot(p_high - 56 / 70, 0.6 - q_low) == pytest.approx(0.3339, abs=1e-4)


def test_newcombes_holds_the_difference_near_one():
    rng = np.random.default_rng(0)
    p, q, n = 0.99, 0.98, 360
    pairs = rng.binomial(n, [p, q], (2000, 2)) / n
    inside = [low <= p - q <= high for low, high in (newcombe(x, y, n) for x, y in pairs)]
    assert 0.93 < np.mean(inside) < 0.99
