"""Plots an evaluation: each score over the subjects with its interval, and the paper's methods.

Needs matplotlib, which the extra `train` installs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hyperrt import files
from hyperrt.plans import private_folder

ACROSS, UP = "clip_t", "dino"  # scores on the axes: fidelity to the prompt, to the subject


def write(path: Path, report: Mapping[str, Any]) -> bool:
    """Writes the plot as PNG; returns False without matplotlib or without scores."""
    if not report["figures"]:
        return False
    try:
        with _matplotlib_in_cache():
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
    except ImportError:
        return False
    parts = (_scores, _methods) if report["paper"]["tables"] else (_scores,)
    figure = Figure(figsize=(5.5 * len(parts), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for part, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False)[0], strict=True):
        part(axes, report)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    files.publish(path, lambda file: file.write(content.getvalue()), force=True)
    return True


@contextmanager
def _matplotlib_in_cache() -> Iterator[None]:
    """Keeps an import of matplotlib from writing outside HyperRT's own folder.

    Its list of fonts goes there. Without a PATH it does not find fc-list, which would write to the system's
    font cache.
    """
    before = {name: os.environ.get(name) for name in ("MPLCONFIGDIR", "PATH")}
    folder = before["MPLCONFIGDIR"] or str(private_folder.base_folder() / "matplotlib")
    os.environ |= {"MPLCONFIGDIR": folder, "PATH": ""}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _scores(axes: Any, report: Mapping[str, Any]) -> None:
    """Draws a dot for each subject, their mean and its interval."""
    for k, (key, figure) in enumerate(report["figures"].items()):
        values = [
            subject["scores"][key] for subject in report["subjects"] if subject["scores"].get(key) is not None
        ]
        axes.plot([k] * len(values), values, ".", color="0.7")
        reach = [[figure["mean"] - figure["low"]], [figure["high"] - figure["mean"]]]
        axes.errorbar([k], [figure["mean"]], yerr=reach, fmt="o", color="C2", capsize=5)
    axes.set_xticks(range(len(report["figures"])), list(report["figures"]), rotation=20)
    axes.set_title("subjects, their mean, its 95 % interval", fontsize=10)


def _methods(axes: Any, report: Mapping[str, Any]) -> None:
    """Draws the paper's rows and this run, if both scores are known."""
    for table in report["paper"]["tables"]:
        columns = table["columns"]
        if ACROSS not in columns or UP not in columns:
            continue
        for row in table["rows"]:
            x, y, label = row[columns.index(ACROSS)], row[columns.index(UP)], row[0]
            if x is not None and y is not None:
                axes.plot([x], [y], "x", color="C0")
                axes.annotate(f"κ {label}" if columns[0] == "kappa" else str(label), (x, y), fontsize=6)
    if ACROSS in report["figures"] and UP in report["figures"]:
        ours = report["figures"]
        comparable = not all(table["doubt"] for table in report["paper"]["tables"])
        label = "this run" if comparable else "this run, with other guidance"
        axes.plot([ours[ACROSS]["mean"]], [ours[UP]["mean"]], "o", color="C2", label=label)
        axes.legend(fontsize=8)
    axes.set_xlabel(ACROSS)
    axes.set_ylabel(UP)
    axes.set_title("beside the paper's methods", fontsize=10)
