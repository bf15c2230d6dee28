"""Runs a measurement in this checkout and at another commit, in turns on one machine.

    python bench/switch.py --against b78425f --turns 5

Each turn runs the script once in both checkouts, with the same options. The order alternates (ABBA), so that
a machine that slows down affects both alike. The other commit is checked out into a temporary folder; neither
checkout is installed. For each figure of the script:

    KEY          median over the turns, in this checkout
    KEY_before   the same at the other commit
    KEY_ratio    median over the turns of this checkout / other commit, for figures in _s, _ms, _mb, _gb

On a busy machine many short turns are better than a few long ones: in most turns both halves then see the
same load, and the median ignores the others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import report

TIME_OR_MEMORY = re.compile(r"_(s|ms|mb|gb)$")
BAR = "<= 1.05"


def add_options(parser: argparse.ArgumentParser, turns: int = 5) -> None:
    """Adds the options of a script that can be compared with another commit."""
    parser.add_argument("--against", metavar="COMMIT", help="also measure this commit: see bench/against.py")
    parser.add_argument("--turns", type=int, default=turns, help="turns of --against (default: %(default)s)")


def finish(script: str, args: argparse.Namespace, bars: Mapping[str, str], *more: str) -> None:
    """Measures both checkouts, and ends the script with the figures of both.

    Args:
        script: `__file__` of the script.
        args: its options, with those of `add_options`.
        bars: as in `report.finish`.
        more: options for both checkouts, in addition to those of the command line.
    """
    options = [*own_options(sys.argv[1:]), *more]
    with worktree(args.against) as before:
        new, old = measured(Path(script).name, before, args.turns, options)
        commit = report.commit(before)
    by_key = ratios(new, old)
    rows = [(key, len(values), median(values), min(values), max(values)) for key, values in by_key.items()]
    report.table(rows, ("new / old", "turns", "median", "min", "max"))
    bars = {**bars, **{f"{key}_ratio": BAR for key in by_key}}
    report.finish(script, compared(new, old), bars, against=commit)


def own_options(words: Sequence[str]) -> list[str]:
    """The command line without the options of `add_options`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(parser)
    return parser.parse_known_args(words)[1]


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Checks a commit out into a temporary folder, and removes it at the end.

    Raises:
        SystemExit: the commit does not exist.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "before"
        git("worktree", "add", "--quiet", "--detach", str(root), commit)
        try:
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


def git(*words: str) -> None:
    result = subprocess.run(["git", *words], cwd=report.ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"git {' '.join(words)} ended with {result.returncode}\n{result.stderr}".strip())


def environment(root: Path, *folders: Path) -> dict[str, str]:
    """Environment variables for a Python that imports from a checkout and from `folders`.

    Settings of HyperRT and of Python, such as PYTHONDONTWRITEBYTECODE, are left out.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HYPERRT", "PYTHON"))}
    return {**others, "PYTHONPATH": os.pathsep.join(map(str, (root, *folders)))}


def run(root: Path, command: Sequence[str], *folders: Path) -> str:
    """Runs Python with the packages of a checkout; returns its stdout and passes its stderr on.

    Raises:
        SystemExit: the command failed.
    """
    words = [sys.executable, *command]
    result = subprocess.run(
        words, env=environment(root, *folders), stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {result.returncode}\n{result.stdout}".strip())
    return result.stdout


def measured(
    name: str, before: Path, turns: int, options: Sequence[str]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Runs the script in turns; returns the figures of each turn in this checkout and at the other commit."""
    figures: dict[Path, list[dict[str, float]]] = {report.ROOT: [], before: []}
    for turn in range(turns):
        for root in (before, report.ROOT) if turn % 2 else (report.ROOT, before):
            output = run(root, [str(root / "bench" / name), *options])
            line = json.loads(output.splitlines()[-1])
            print(f"turn {turn + 1} of {turns}", line["commit"], line["figures"], file=sys.stderr, flush=True)
            figures[root].append(line["figures"])
    return figures[report.ROOT], figures[before]


def compared(new: list[dict[str, float]], old: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the turns of both, and the ratios."""
    figures: dict[str, float] = {}
    for key in new[0]:
        figures[key] = median(turn[key] for turn in new)
        if key in old[0]:
            figures[f"{key}_before"] = median(turn[key] for turn in old)
    return figures | {f"{key}_ratio": median(values) for key, values in ratios(new, old).items()}


def ratios(new: list[dict[str, float]], old: list[dict[str, float]]) -> dict[str, list[float]]:
    """New / old of each turn, for every time and memory that both checkouts measure."""
    keys = [key for key in new[0] if key in old[0] and TIME_OR_MEMORY.search(key)]
    turns = list(zip(new, old, strict=True))
    return {key: [after[key] / before[key] for after, before in turns] for key in keys}
