"""Plots the tables of bench/paper_small.py: scores along the rows, and likeness against prompt."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import scoring
from paper_rows import Row, Table

matplotlib.use("Agg")  # needs no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

LINES = {
    scoring.SUBJECT: "likeness (encoder)",
    scoring.COLOURS: "likeness (colours)",
    scoring.PROMPT: "margin of the prompt's scene",
}


def write(table: Table, path: Path) -> None:
    """Writes the plot of a table as a PNG; bars are 95 % intervals over the subjects."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=110)
    _scores(left, table)
    _trade_off(right, table)
    figure.suptitle(table.title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _scores(axes: Axes, table: Table) -> None:
    for score, label in LINES.items():
        means, bars = _means(table.rows, score)
        axes.errorbar(range(len(table.rows)), means, bars, marker="o", capsize=3, label=label)
    axes.set_xticks(range(len(table.rows)), [row.label for row in table.rows], rotation=25, ha="right")
    axes.grid(alpha=0.3)
    axes.set_ylim(top=axes.get_ylim()[1] + 0.3 * (axes.get_ylim()[1] - axes.get_ylim()[0]))
    axes.legend(loc="upper center", ncols=2, fontsize="x-small")  # above the lines


def _trade_off(axes: Axes, table: Table) -> None:
    across, across_bars = _means(table.rows, scoring.PROMPT)
    up, up_bars = _means(table.rows, scoring.SUBJECT)
    axes.errorbar(across, up, up_bars, across_bars, fmt="o", capsize=3)
    for row, x, y in zip(table.rows, across, up, strict=True):
        axes.annotate(row.label, (x, y), textcoords="offset points", xytext=(6, 6))
    axes.set_xlabel(LINES[scoring.PROMPT])
    axes.set_ylabel(LINES[scoring.SUBJECT])
    axes.grid(alpha=0.3)


def _means(rows: list[Row], score: str) -> tuple[list[float], list[list[float]]]:
    """Means, and the lengths of the intervals below and above them."""
    intervals = [row.interval(score) for row in rows]
    reach = [[x.mean - x.low for x in intervals], [x.high - x.mean for x in intervals]]
    return [x.mean for x in intervals], reach
