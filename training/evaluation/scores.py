"""The arithmetic of an evaluation: cosines, means over pictures, then over subjects, with intervals.

Features are [n, F] of unit length. A score that there is none of is None, and enters no mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hyperrt.training.evaluation.intervals import mean_interval

Score = float | None


def unit(features: np.ndarray) -> np.ndarray:
    """[n, F] of any length to float64 of unit length."""
    wide = np.asarray(features, np.float64)
    return wide / np.linalg.norm(wide, axis=-1, keepdims=True)


def mean_cosines(pictures: np.ndarray, references: np.ndarray) -> list[float]:
    """For each picture its mean cosine with all references: CLIP-I, DINO."""
    return [float(value) for value in (pictures @ references.T).mean(axis=1)]


def among_themselves(features: np.ndarray, with_self: bool) -> Score:
    """Mean cosine of the photos of one subject with each other; None for one photo without itself."""
    count = len(features)
    cosines = features @ features.T
    if with_self:
        return float(cosines.mean())
    if count < 2:
        return None
    return float((cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


def mean(values: Iterable[Score]) -> Score:
    """Mean of what is there; None of nothing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def means(rows: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """The mean of each key over rows that may lack it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: mean(row.get(key) for row in rows) for key in keys}


def average(scores: Mapping[str, Score], keys: Sequence[str]) -> dict[str, Score]:
    """`avg`, the mean of these scores, as one more score; nothing where one of them is missing."""
    parts = [scores.get(key) for key in keys]
    return {"avg": mean(parts)} if parts and None not in parts else {}


def figures(subjects: Sequence[Mapping[str, Score]]) -> dict[str, dict[str, float | int]]:
    """Each score's mean over subjects, the ends of its bootstrap interval, and how many have it."""
    found = {}
    for key in dict.fromkeys(key for scores in subjects for key in scores):
        known = [value for scores in subjects if (value := scores.get(key)) is not None]
        if known:
            interval = mean_interval(known)
            found[key] = {
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "subjects": len(known),
            }
    return found
