"""The same measurement in this checkout and at another commit, by turns on one machine.

    python bench/switch.py --against b78425f --turns 5

Each turn runs the script of that name once in both checkouts, with the same options; the order changes from
turn to turn (ABBA), so that a machine that becomes slower hits both alike. The other commit is checked out
into a temporary folder. Both run from their folder, neither is installed. For each figure of both scripts:

    KEY          median over the turns, here
    KEY_before   the same of the other commit
    KEY_ratio    median over the turns of here / before, of figures in _s, _ms, _mb, _gb

On a machine with other work, many short turns are better than few long ones: both halves of a turn then meet
the same load, and the median leaves out the turns in which they did not.
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
    """The options of a script that can be compared with another commit."""
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit, too: see against.py")
    parser.add_argument("--turns", type=int, default=turns, help="with --against (default: %(default)s)")


def finish(script: str, args: argparse.Namespace, bars: Mapping[str, str], *more: str) -> None:
    """Measure both checkouts, and end the script with the figures of both.

    Args:
        script: its `__file__`.
        args: its options, with those of `add_options`.
        bars: as `report.finish`.
        more: options that both are given beside those of the command line.
    """
    options = [*own_options(sys.argv[1:]), *more]
    with worktree(args.against) as before:
        here, there = measured(Path(script).name, before, args.turns, options)
        commit = report.commit(before)
    by_key = ratios(here, there)
    rows = [(key, len(values), median(values), min(values), max(values)) for key, values in by_key.items()]
    report.table(rows, ("here / before", "turns", "median", "least", "most"))
    bars = {**bars, **{f"{key}_ratio": BAR for key in by_key}}
    report.finish(script, compared(here, there), bars, against=commit)


def own_options(words: Sequence[str]) -> list[str]:
    """The options of the script itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(parser)
    return parser.parse_known_args(words)[1]


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The folder of a checkout of that commit, removed at the end.

    Raises SystemExit if there is no such commit.
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
    """Variables with which Python imports the packages of that checkout, and modules of the folders.

    Settings of HyperRT and of Python, such as one that keeps byte code from being written, are left out.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HYPERRT", "PYTHON"))}
    return {**others, "PYTHONPATH": os.pathsep.join(map(str, (root, *folders)))}


def run(root: Path, command: Sequence[str], *folders: Path) -> str:
    """What Python prints with the packages of that checkout; its stderr is this process's.

    Raises SystemExit if it fails.
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
    """The figures of each turn here, and at the other commit."""
    figures: dict[Path, list[dict[str, float]]] = {report.ROOT: [], before: []}
    for turn in range(turns):
        for root in (before, report.ROOT) if turn % 2 else (report.ROOT, before):
            output = run(root, [str(root / "bench" / name), *options])
            line = json.loads(output.splitlines()[-1])
            print(f"turn {turn + 1} of {turns}", line["commit"], line["figures"], file=sys.stderr, flush=True)
            figures[root].append(line["figures"])
    return figures[report.ROOT], figures[before]


def compared(here: list[dict[str, float]], there: list[dict[str, float]]) -> dict[str, float]:
    """Figures of several turns to one figure each, beside the other commit's."""
    figures: dict[str, float] = {}
    for key in here[0]:
        figures[key] = median(turn[key] for turn in here)
        if key in there[0]:
            figures[f"{key}_before"] = median(turn[key] for turn in there)
    return figures | {f"{key}_ratio": median(values) for key, values in ratios(here, there).items()}


def ratios(here: list[dict[str, float]], there: list[dict[str, float]]) -> dict[str, list[float]]:
    """Here / before of each turn, of every time and memory that both scripts measure."""
    keys = [key for key in here[0] if key in there[0] and TIME_OR_MEMORY.search(key)]
    return {key: [new[key] / old[key] for new, old in zip(here, there, strict=True)] for key in keys}
