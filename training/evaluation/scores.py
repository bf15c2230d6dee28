"""Computes cosines, their means over pictures, then over subjects, with intervals.

Features are [n, F] of unit length. A missing score is None and does not count in a mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hyperrt.training.evaluation.intervals import mean_interval

Score = float | None


def unit(features: np.ndarray) -> np.ndarray:
    """Scales features [n, F] to unit length; float64."""
    wide = np.asarray(features, np.float64)
    return wide / np.linalg.norm(wide, axis=-1, keepdims=True)


def mean_cosines(pictures: np.ndarray, references: np.ndarray) -> list[float]:
    """The mean cosine of each picture with all references: CLIP-I, DINO."""
    return [float(value) for value in (pictures @ references.T).mean(axis=1)]


def among_themselves(features: np.ndarray, with_self: bool) -> Score:
    """Mean cosine of the photos of one subject with each other.

    Args:
        with_self: also compare each photo with itself; otherwise a single photo gives None.
    """
    count = len(features)
    cosines = features @ features.T
    if with_self:
        return float(cosines.mean())
    if count < 2:
        return None
    return float((cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


def mean(values: Iterable[Score]) -> Score:
    """Mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def means(rows: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """The mean of each score over rows; a row may lack a score."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: mean(row.get(key) for row in rows) for key in keys}


def average(scores: Mapping[str, Score], keys: Sequence[str]) -> dict[str, Score]:
    """{"avg": mean of these scores}, or an empty dict if one of them is missing."""
    parts = [scores.get(key) for key in keys]
    return {"avg": mean(parts)} if parts and None not in parts else {}


def figures(subjects: Sequence[Mapping[str, Score]]) -> dict[str, dict[str, float | int]]:
    """The mean of each score over the subjects, its bootstrap interval, and how many have it."""
    figures = {}
    for key in dict.fromkeys(key for scores in subjects for key in scores):
        values = [value for scores in subjects if (value := scores.get(key)) is not None]
        if values:
            interval = mean_interval(values)
            figures[key] = {
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "subjects": len(values),
            }
    return figures
