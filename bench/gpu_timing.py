"""How bench/gpu.py times a kind, inside a process of its own: a step, a change of subject, a picture.

What is timed returns when it is done: who computes on a GPU waits for it in the call.  Before anything
counts, the word `measuring` goes to stdout: from there on the parent watches the device's memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import report

Call = Callable[[], object]
MEASURING = "measuring"


class Absent(Exception):
    """A kind cannot be measured here; the text says why."""


def options() -> argparse.ArgumentParser:
    """What the parent tells a child beside the kind."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rounds", type=int, default=10, help="that count (default: 10)")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds that do not (default: 3)")
    parser.add_argument("--steps", type=int, default=30, help="of a picture (default: 30)")
    parser.add_argument(
        "--precision", choices=("fp16", "bf16", "fp32"), default="fp16", help="(default: fp16)"
    )
    return parser


def figures(
    step: Call, switch: Call, picture: Call, args: argparse.Namespace, settle: Call = lambda: None
) -> dict[str, float]:
    """Medians of a step and of a change of subject, in ms; seconds of one picture; GB of the host's memory.

    Args:
        step: one step; it is called `warm_up + rounds` times.
        switch: another subject than the last one, ready for its first step.
        picture: all steps of one picture, from noise to latents.
        settle: gives back what only the warm-up needed.
    """
    for _ in range(args.warm_up):
        step()
    settle()
    print(MEASURING, flush=True)
    steps = [report.milliseconds(step) for _ in range(args.rounds)]
    switches = [report.milliseconds(switch) for _ in range(args.warm_up + args.rounds)]
    seconds = report.milliseconds(picture) / 1000
    found = {"step_ms": median(steps), "switch_ms": median(switches[args.warm_up :]), "picture_s": seconds}
    return found | {"peak_gb": report.peak_bytes() / 1e9}


def device(torch: Any, args: argparse.Namespace) -> str:
    """Where PyTorch computes: "cuda", or "cpu" for --quick.

    Raises:
        Absent: it sees no GPU; its times on the CPU would pass for those of one.
    """
    if torch.cuda.is_available():
        return "cuda"
    if args.quick:
        return "cpu"
    raise Absent(f"PyTorch {torch.__version__} sees no GPU")


def last_words(text: str) -> str:
    """Of what a command said, the error that it ended with: our three lines, or the last three."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-3:])
