"""The plot of an evaluation: each score over subjects with its interval, and the paper's methods.

Drawn where matplotlib is installed, which only the extra `train` brings.
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

ACROSS, UP = "clip_t", "dino"  # what the prompt asks for, and who it is


def write(path: Path, report: Mapping[str, Any]) -> bool:
    """Writes the plot as PNG; False where there is no matplotlib, or no figure to draw."""
    if not report["figures"]:
        return False
    try:
        with _own_folder():
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
def _own_folder() -> Iterator[None]:
    """While matplotlib is imported: its list of fonts goes to HyperRT's cache, not to two folders at home.

    Without a PATH it does not find fc-list either, which would write to the system's font cache.
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
    """A dot for each subject, the mean over them, and its interval."""
    for k, (key, found) in enumerate(report["figures"].items()):
        values = [row["scores"][key] for row in report["subjects"] if row["scores"].get(key) is not None]
        axes.plot([k] * len(values), values, ".", color="0.7")
        reach = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
        axes.errorbar([k], [found["mean"]], yerr=reach, fmt="o", color="C2", capsize=5)
    axes.set_xticks(range(len(report["figures"])), list(report["figures"]), rotation=20)
    axes.set_title("subjects, their mean, its 95 % interval", fontsize=10)


def _methods(axes: Any, report: Mapping[str, Any]) -> None:
    """The paper's rows and this run, where both scores are known."""
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
        alike = not all(table["doubt"] for table in report["paper"]["tables"])
        label = "this run" if alike else "this run, with other guidance"
        axes.plot([ours[ACROSS]["mean"]], [ours[UP]["mean"]], "o", color="C2", label=label)
        axes.legend(fontsize=8)
    axes.set_xlabel(ACROSS)
    axes.set_ylabel(UP)
    axes.set_title("beside the paper's methods", fontsize=10)
