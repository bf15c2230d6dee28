"""Times calls in a peer's environment; imports nothing of the project."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of all scripts of peers."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("step", "switch"))
    parser.add_argument("folder", type=Path, help="model written by peer_model.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=900, help="seconds after which no round begins")
    return parser


def repeat(call: Callable[[], object], args: argparse.Namespace) -> dict[str, object]:
    """Times a call after warm-up rounds; returns median and least seconds, and the number of rounds.

    A slow call is measured in as many rounds as begin within the limit, but at least once.
    """
    times: list[float] = []
    begin = perf_counter()
    for turn in range(args.warm_up + args.rounds):
        if times and perf_counter() - begin > args.limit:
            break
        start = perf_counter()
        call()
        elapsed = perf_counter() - start
        print(f"round {turn}: {elapsed:.4f} s", file=sys.stderr, flush=True)
        if turn >= args.warm_up or elapsed > args.limit:
            times.append(elapsed)
    return summary(times)


def summary(times: list[float]) -> dict[str, object]:
    """Median and least of some seconds."""
    return {"median_s": median(times), "least_s": min(times), "rounds": len(times)}


def versions(*packages: str) -> dict[str, str]:
    """Version of each package in this environment."""
    return {package: version(package) for package in packages}
