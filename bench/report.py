"""What every measurement here has in common: options, tables, and the JSON line at the end.

A script prints a table for people; its last line on stdout is one JSON object, so that figures can be
compared between commits:

    {"bench": name, "commit": ..., "machine": ..., "figures": {key: number}}
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

from hyperrt.engines.memory import peak_bytes as peak_bytes

ROOT = Path(__file__).resolve().parents[1]
CPU_INFO = Path("/proc/cpuinfo")


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of all scripts; `description` is the docstring of the script."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bundle", default="tiny", help="name of a bundle in the wheel, or a folder (default: tiny)"
    )
    parser.add_argument("--quick", action="store_true", help="run the minimum, to test the script")
    return parser


def milliseconds(work: Callable[[], object]) -> float:
    """The time of one call, in ms."""
    start = perf_counter()
    work()
    return 1000 * (perf_counter() - start)


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> None:
    """Prints aligned rows under a head, floats with four significant digits; prints nothing without rows."""
    if not rows:
        return
    cells = [list(head)] + [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def finish(
    script: str, figures: Mapping[str, float], bars: Mapping[str, str] | None = None, **more: str
) -> None:
    """Prints the figures as a table, and as the JSON line that ends every script.

    Args:
        script: `__file__` of the script.
        figures: key -> number.
        bars: key -> target, for the table.
        more: further keys of the JSON line.
    """
    table(
        [(key, float(value), (bars or {}).get(key, "")) for key, value in figures.items()],
        ("figure", "measured", "target"),
    )
    line = {"bench": Path(script).stem, "commit": commit(), "machine": machine(), "figures": dict(figures)}
    print(json.dumps(line | more), flush=True)


def commit(root: Path = ROOT) -> str:
    """Short hash of a checkout's commit, "-dirty" if files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def machine() -> str:
    """Processor, number of CPUs that this process may use, system, versions of Python and ONNX Runtime."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{names[0] if names else platform.machine()}, {usable} CPUs, {platform.system()}, "
        f"Python {platform.python_version()}, {onnx_runtime()}"
    )


def onnx_runtime() -> str:
    """Name and version of the installed package of ONNX Runtime."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "no onnxruntime"
