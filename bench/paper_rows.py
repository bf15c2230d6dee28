"""Rows of a table with their intervals, and whether they are ordered as the paper says.

An ordering along a sweep is held when the means are in order and the intervals at its ends do not touch; one
of two rows when their means are in order.  All rows are of the same subjects with the same noise, and most of
an interval is how subjects differ.  So a sweep also says whether it holds in pairs: it is in order, and the
interval of a subject's difference between the ends is above zero.
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
    """One thing that the paper's table says, and whether ours says it, too; if not, whether in pairs."""

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
        """What is kept of it."""
        return {
            "table": self.name,
            "title": self.title,
            "settings": dict(self.settings),
            "rows": [row.to_json() for row in self.rows],
            "orderings": {one.name: one.held for one in self.orderings},
            "orderings_in_pairs": {one.name: one.in_pairs for one in self.orderings},
        }


def rises(name: str, rows: Sequence[Row], score: str) -> Ordering:
    """The score rises along the rows, from end to end by more than the intervals."""
    first, last = rows[0], rows[-1]
    ordered = all(np.diff([row.interval(score).mean for row in rows]) > 0)
    apart = first.interval(score).apart_from(last.interval(score))
    differ = mean_interval(last.scores[score] - first.scores[score]).low > 0
    return Ordering(name, ordered and apart, ordered and differ)


def falls(name: str, rows: Sequence[Row], score: str) -> Ordering:
    """The score falls along the rows."""
    return rises(name, rows[::-1], score)


def compared(name: str, held: bool) -> Ordering:
    """An ordering of two rows: which mean is higher does not change in pairs."""
    return Ordering(name, held, held)


def above(name: str, higher: Row, lower: Row, score: str) -> Ordering:
    """The mean score of one row is above another's."""
    return compared(name, higher.interval(score).mean > lower.interval(score).mean)


def all_above(name: str, pairs: Iterable[tuple[Row, Row]], score: str) -> Ordering:
    """In every pair the mean score of the first row is above the second's."""
    return compared(name, all(above(name, *pair, score).held for pair in pairs))


def not_below(name: str, row: Row, other: Row, score: str) -> Ordering:
    """Nothing is lost: over the same cases, the interval of the difference reaches zero or lies above it."""
    return compared(name, mean_interval(row.scores[score] - other.scores[score]).high >= 0)
