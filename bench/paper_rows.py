"""Rows of a table with their intervals, and whether they are ordered as the paper says.

An ordering along a sweep is held when the means are in order and the intervals at its ends do not touch; one
of two rows when their means are in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scoring

from training.intervals import Interval, mean_interval


@dataclass(frozen=True, eq=False)
class Row:
    """One setting and what its pictures scored.

    label: for people; point: the setting; scores: name -> [cases]; more: figures that are not of pictures.
    """

    label: str
    point: Mapping[str, Any]
    scores: scoring.Scores
    more: Mapping[str, float] = field(default_factory=dict)

    def interval(self, score: str) -> Interval:
        """Mean of a score over the cases with its interval."""
        return mean_interval(self.scores[score])

    def to_json(self) -> dict[str, Any]:
        """Settings and intervals, without the values of the cases."""
        found = {name: vars(self.interval(name)) for name in self.scores}
        return {"label": self.label, **self.point, "scores": found, **self.more}


@dataclass(frozen=True)
class Ordering:
    """One thing that the paper's table says, and whether ours says it, too."""

    name: str
    held: bool


@dataclass(frozen=True, eq=False)
class Table:
    """A table of the paper, at small scale."""

    name: str  # "table9"
    title: str
    rows: Sequence[Row]
    orderings: Sequence[Ordering]
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What is kept of it."""
        return {
            "table": self.name,
            "title": self.title,
            "settings": dict(self.settings),
            "rows": [row.to_json() for row in self.rows],
            "orderings": {one.name: one.held for one in self.orderings},
        }


def rises(name: str, rows: Sequence[Row], score: str) -> Ordering:
    """The score rises along the rows, from end to end by more than the intervals."""
    means = [row.interval(score).mean for row in rows]
    apart = rows[0].interval(score).apart_from(rows[-1].interval(score))
    return Ordering(name, all(np.diff(means) > 0) and apart)


def falls(name: str, rows: Sequence[Row], score: str) -> Ordering:
    """The score falls along the rows."""
    return rises(name, rows[::-1], score)


def above(name: str, higher: Row, lower: Row, score: str) -> Ordering:
    """The mean score of one row is above another's."""
    return Ordering(name, higher.interval(score).mean > lower.interval(score).mean)


def all_above(name: str, pairs: Iterable[tuple[Row, Row]], score: str) -> Ordering:
    """In every pair the mean score of the first row is above the second's."""
    return Ordering(name, all(above(name, *pair, score).held for pair in pairs))


def not_below(name: str, row: Row, other: Row, score: str) -> Ordering:
    """Nothing is lost: over the same cases, the interval of the difference reaches zero or lies above it."""
    return Ordering(name, mean_interval(row.scores[score] - other.scores[score]).high >= 0)
