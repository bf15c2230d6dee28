"""Bootstrap intervals of means over subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float

    def apart_from(self, other: Interval) -> bool:
        """Whether the two intervals do not overlap."""
        return self.low > other.high or self.high < other.low

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of one value per subject and its 95 % percentile interval (Efron 1979).

    Subjects are resampled, so average the pictures of each subject first. Equal values, or a single one,
    give an interval of zero width.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    sample = np.asarray(values, np.float64)
    if not sample.size or not np.isfinite(sample).all():
        raise ValueError(f"a mean of {sample.size} values needs at least one, all finite")
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean, mean, mean)
    interval = bootstrap(
        (sample,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return Interval(mean, float(interval.low), float(interval.high))
