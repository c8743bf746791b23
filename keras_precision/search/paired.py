"""Differences of one quantity, sample by sample, between a changed model and the original."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np


@dataclasses.dataclass(frozen=True)
class Paired:
    """Means and variances of a per-sample quantity before and after a change; enough for any bound on the increase.

    Attributes:
        samples: int > 1.
        base: mean before.
        increase: mean after minus mean before.
        increase_variance: of the differences, per sample, unbiased.
        base_variance: of the values before, likewise.
        covariance: of the two.
    """

    samples: int
    base: float
    increase: float
    increase_variance: float
    base_variance: float
    covariance: float

    @classmethod
    def of(cls, after: np.ndarray, before: np.ndarray) -> Paired:
        """Returns the statistics of two float arrays (n,), n > 1; an infinite increase where NaN or inf is in them."""
        before = np.asarray(before, "float64")
        difference = np.asarray(after, "float64") - before
        if not np.isfinite(difference).all():
            return cls(len(before), float(before.mean()), math.inf, math.inf, 0.0, 0.0)
        covariances = np.cov(difference, before)
        return cls(
            len(before),
            float(before.mean()),
            float(difference.mean()),
            float(covariances[0, 0]),
            float(covariances[1, 1]),
            float(covariances[0, 1]),
        )

    @property
    def value(self) -> float:
        """Mean after."""
        return self.base + self.increase

    @property
    def standard_error(self) -> float:
        """Of the mean increase."""
        return math.sqrt(self.increase_variance / self.samples)

    def excess(self, confidence: float, relative: float = 0.0, is_share: bool = False) -> float:
        """Returns a one-sided upper confidence limit of the mean of `increase - relative * before`.

        The mean plus Student's t quantile times its standard error; samples
        must be independent, and the mean about normally distributed.

        Args:
            confidence: in (0.5, 1).
            relative: the share of the value before that is allowed.
            is_share: True for values in [0, 1], most of which may be equal:
                z**2 samples are added, z the normal quantile, half of which
                got worse by 1, so that a few equal answers don't pass for
                certainty (as Agresti and Coull 1998 do for a proportion).
        """
        if not math.isfinite(self.increase):
            return math.inf
        n = self.samples
        mean = self.increase - relative * self.base
        variance = self.increase_variance - 2 * relative * self.covariance + relative**2 * self.base_variance
        if is_share:
            added = statistics.NormalDist().inv_cdf(confidence) ** 2
            total, squares = n * mean + added / 2, variance * (n - 1) + n * mean**2 + added / 2
            n += added
            mean = total / n
            variance = (squares - n * mean**2) / (n - 1)
        return mean + t_quantile(confidence, n - 1) * math.sqrt(max(variance, 0.0) / n)


def t_quantile(confidence: float, degrees: float) -> float:
    """Returns Student's t quantile by the expansion of Abramowitz and Stegun, 26.7.5: within 1% from 8 degrees on.

    >>> round(t_quantile(0.95, 10), 2), round(t_quantile(0.999, 30), 2)
    (1.81, 3.39)
    """
    z = statistics.NormalDist().inv_cdf(confidence)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
