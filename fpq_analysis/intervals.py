"""Confidence intervals: Student's for means, over one factor or two; Wilson's and Newcombe's for proportions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

Z95 = 1.96  # half of the normal 95 % interval, in standard errors


def half_interval(sem: float, dof: float, level: float = 0.95) -> float:
    """Half of the two-sided Student interval at `level`, from a standard error with `dof` degrees of freedom."""
    return float(stdtrit(dof, (1 + level) / 2)) * sem if sem else 0.0


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values, and half of its 95 % Student interval."""
    sem = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half_interval(sem, len(values) - 1)


@dataclass(frozen=True)
class Crossed:
    """The mean of a number measured for each of S seeds on each of N images, all images in all seeds.

    Attributes:
        value: the mean.
        sem: its standard error as an estimate for all seeds and all images, both being random samples.
        dof: its degrees of freedom, for Student's t (Satterthwaite 1946).
        sem_images: standard error over the images, for these seeds alone.
        n_seeds, n_images: S and N.
        mean_squares: between seeds, between images, and of the interaction.
    """

    value: float
    sem: float
    dof: float
    sem_images: float
    n_seeds: int
    n_images: int
    mean_squares: tuple[float, float, float]

    @property
    def ci95(self) -> float:
        """Half of the 95 % interval over seeds and images."""
        return half_interval(self.sem, self.dof)

    @property
    def ci95_images(self) -> float:
        """Half of the 95 % interval over the images alone."""
        return half_interval(self.sem_images, self.n_images - 1)

    def seeds_needed(self, half: float, most: int = 1000) -> int | None:
        """With how many seeds, on as many images, the 95 % interval is expected to be as short as +- `half`.

        None if not even `most` are enough: the images are too few.
        """
        seeds, images, interaction = self.mean_squares
        of_seeds = max(seeds - interaction, 0.0) + interaction
        of_images = max(images - interaction, 0.0) / self.n_seeds
        for n in range(3, most + 1):
            sem, dof = _satterthwaite(of_seeds, n * of_images, n, self.n_images)
            if half_interval(sem, dof) <= half:
                return n
        return None


def crossed(values: np.ndarray) -> Crossed:
    """The mean over seeds and images, with an error for both.

    The model is mean + seed + image + interaction, all random.  The variance of the mean is estimated from the mean
    squares of the two-way table as (MS_seeds + max(MS_images - MS_interaction, 0)) / (S N).

    Args:
        values: (S, N), S and N at least 2.
    """
    values = np.asarray(values, dtype=float)
    s, n = values.shape
    mean, by_seed, by_image = values.mean(), values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_image + mean
    seeds, images = n * by_seed.var(ddof=1), s * by_image.var(ddof=1)
    interaction = (rest**2).sum() / ((s - 1) * (n - 1))
    sem, dof = _satterthwaite(seeds, max(images - interaction, 0.0), s, n)
    of_images = math.sqrt(by_image.var(ddof=1) / n)
    return Crossed(float(mean), sem, dof, of_images, s, n, (float(seeds), float(images), float(interaction)))


def _satterthwaite(of_seeds: float, of_images: float, s: int, n: int) -> tuple[float, float]:
    """Standard error of the mean of (s, n) values and its degrees of freedom, from the two parts of its variance."""
    total = of_seeds + of_images
    if total == 0:
        return 0.0, s - 1.0
    return math.sqrt(total / (s * n)), total**2 / (of_seeds**2 / (s - 1) + of_images**2 / (n - 1))


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
