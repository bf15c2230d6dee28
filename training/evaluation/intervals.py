"""How sure is a mean? Bootstrap intervals, over subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval."""

    mean: float
    low: float
    high: float

    def apart_from(self, other: Interval) -> bool:
        """The two do not touch."""
        return self.low > other.high or self.high < other.low

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of one value per subject and its 95 % percentile interval (Efron 1979).

    The subjects are resampled, so average what one subject has of pictures before. Values that are all equal,
    or a single one, have an interval of no width.

    Raises:
        ValueError: no values, or one that is not a finite number.
    """
    sample = np.asarray(values, np.float64)
    if not sample.size or not np.isfinite(sample).all():
        raise ValueError(f"a mean of {sample.size} values needs at least one, all finite")
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean, mean, mean)
    found = bootstrap(
        (sample,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
