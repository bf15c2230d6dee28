"""Rows of a table with their intervals, and tests whether they are in the paper's order.

An ordering of a sweep holds if the means are in order and the intervals of the first and last row do not
overlap; an ordering of two rows, if their means are in order.  All rows have the same subjects and the same
noise, and most of an interval is the difference between subjects.  So a sweep also holds "in pairs" if the
means are in order and the interval of the subjects' differences between first and last row is above zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scoring

from hyperrt.training.evaluation.intervals import Interval, mean_interval


@dataclass(frozen=True, eq=False)
class Row:
    """A setting and the scores of its pictures.

    Attributes:
        label: the setting, for people.
        point: the setting, as keys of the JSON file.
        scores: name -> [cases].
        more: figures that are not scores of pictures.
    """

    label: str
    point: Mapping[str, Any]
    scores: scoring.Scores
    more: Mapping[str, float] = field(default_factory=dict)

    def interval(self, score: str) -> Interval:
        """Mean and interval of a score over the cases."""
        return mean_interval(self.scores[score])

    def to_json(self) -> dict[str, Any]:
        """Settings and intervals, without the values of the cases."""
        intervals = {name: vars(self.interval(name)) for name in self.scores}
        return {"label": self.label, **self.point, "scores": intervals, **self.more}


@dataclass(frozen=True)
class Ordering:
    """An ordering in the paper's table, and whether it holds in ours, and in pairs."""

    name: str
    held: bool
    in_pairs: bool


@dataclass(frozen=True, eq=False)
class Table:
    """A table of the paper, at small scale."""

    name: str  # "table9"
    title: str
    rows: Sequence[Row]
    orderings: Sequence[Ordering]
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "table": self.name,
            "title": self.title,
            "settings": dict(self.settings),
            "rows": [row.to_json() for row in self.rows],
            "orderings": {ordering.name: ordering.held for ordering in self.orderings},
            "orderings_in_pairs": {ordering.name: ordering.in_pairs for ordering in self.orderings},
        }


def rises(name: str, rows: Sequence[Row], score: str) -> Ordering:
    """The score rises along the rows, from first to last by more than the intervals."""
    first, last = rows[0], rows[-1]
    ordered = all(np.diff([row.interval(score).mean for row in rows]) > 0)
    apart = first.interval(score).apart_from(last.interval(score))
    differ = mean_interval(last.scores[score] - first.scores[score]).low > 0
    return Ordering(name, ordered and apart, ordered and differ)


def falls(name: str, rows: Sequence[Row], score: str) -> Ordering:
    """The score falls along the rows."""
    return rises(name, rows[::-1], score)


def compared(name: str, held: bool) -> Ordering:
    """An ordering of two rows, which is the same in pairs."""
    return Ordering(name, held, held)


def above(name: str, higher: Row, lower: Row, score: str) -> Ordering:
    """The mean score of the first row is above that of the second."""
    return compared(name, higher.interval(score).mean > lower.interval(score).mean)


def all_above(name: str, pairs: Iterable[tuple[Row, Row]], score: str) -> Ordering:
    """In every pair the mean score of the first row is above the second's."""
    return compared(name, all(above(name, *pair, score).held for pair in pairs))


def not_below(name: str, row: Row, other: Row, score: str) -> Ordering:
    """No loss: over the same cases, the interval of the difference reaches zero or is above it."""
    return compared(name, mean_interval(row.scores[score] - other.scores[score]).high >= 0)
