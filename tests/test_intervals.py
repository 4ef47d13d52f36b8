"""Intervals against scipy's distributions, closed forms, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fpq_analysis.intervals import crossed, half_interval, newcombe, over_seeds, wilson


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


@pytest.mark.simulation
def test_newcombes_holds_the_difference_near_one():
    rng = np.random.default_rng(0)
    p, q, n = 0.99, 0.98, 360
    pairs = rng.binomial(n, [p, q], (2000, 2)) / n
    inside = [low <= p - q <= high for low, high in (newcombe(x, y, n) for x, y in pairs)]
    assert 0.93 < np.mean(inside) < 0.99


class TestCrossed:
    """The mean over seeds and images, both random."""

    # Variances of seeds, images and interaction, the first relative to what 64 images leave.
    @pytest.mark.parametrize("n_seeds", [3, 4, 5])
    @pytest.mark.parametrize(
        "variances", [(1, 0, 0.01), (0, 1, 0.1), (0, 0, 1), (1 / 64, 1, 1), (5 / 64, 1, 1), (0, 1, 5)]
    )
    def test_coverage(self, n_seeds, variances):
        rng = np.random.default_rng(n_seeds)
        seeds, images, interaction = np.sqrt(variances)
        held = 0
        for _ in range(500):
            values = (
                3.0
                + seeds * rng.standard_normal((n_seeds, 1))
                + images * rng.standard_normal(64)
                + interaction * rng.standard_normal((n_seeds, 64))
            )
            found = crossed(values)
            held += abs(found.value - 3.0) <= found.ci95
        assert 0.92 <= held / 500 <= 0.98

    def test_one_factor_alone_is_students_interval(self):
        means = np.array([1.0, 2.0, 4.0])
        found = crossed(np.repeat(means[:, None], 50, 1))
        assert (found.value, found.ci95) == pytest.approx(over_seeds(list(means)))
        assert found.sem_images == 0
        values = np.random.default_rng(0).standard_normal(50)
        found = crossed(np.stack([values] * 3))
        assert found.sem == pytest.approx(stats.sem(values)) == found.sem_images
        assert found.dof == pytest.approx(49)

    def test_mean_squares_are_those_of_the_two_way_table(self):
        """Sums of squares add up to the total one."""
        values = np.random.default_rng(1).standard_normal((4, 30))
        seeds, images, interaction = crossed(values).mean_squares
        assert 3 * seeds + 29 * images + 3 * 29 * interaction == pytest.approx(((values - values.mean()) ** 2).sum())

    def test_seeds_needed(self):
        rng = np.random.default_rng(2)
        found = crossed(rng.standard_normal((5, 1)) + 0.01 * rng.standard_normal((5, 64)))
        assert found.seeds_needed(found.ci95 * 1.0001) <= 5
        few, many = found.seeds_needed(0.5), found.seeds_needed(0.25)
        assert 3 < few < many
        spread = np.sqrt(found.mean_squares[0] / 64)  # standard deviation of a seed
        assert stats.t.ppf(0.975, many - 1) * spread / many**0.5 == pytest.approx(0.25, rel=0.1)
        assert crossed(rng.standard_normal(64) + np.zeros((3, 1))).seeds_needed(1e-3) is None  # more images it takes

    def test_equal_numbers_have_no_error(self):
        assert crossed(np.full((3, 8), 2.0)).ci95 == 0
