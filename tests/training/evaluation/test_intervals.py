"""Intervals of means."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt.training.evaluation.intervals import Interval, mean_interval


def test_an_interval_covers_the_true_mean_at_its_level() -> None:
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(3.0, 1.0, 40)) for _ in range(200)]
    assert 0.90 <= np.mean([interval.low <= 3.0 <= interval.high for interval in intervals]) <= 0.99


def test_equal_values_have_no_width() -> None:
    assert mean_interval([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    assert mean_interval([1.0]) == Interval(1.0, 1.0, 1.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).random(30)
    assert mean_interval(values) == mean_interval(values)


def test_intervals_are_apart_if_they_do_not_overlap() -> None:
    assert Interval(0.5, 0.4, 0.6).apart_from(Interval(0.8, 0.7, 0.9))
    assert not Interval(0.5, 0.4, 0.7).apart_from(Interval(0.8, 0.7, 0.9))


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_a_mean_needs_finite_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)
