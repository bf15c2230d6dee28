"""Times a kind of bench/gpu.py in its process: a step, a change of subject, a picture.

Each timed call waits for the GPU before it returns.  The word `measuring` on stdout, before the first timed
call, tells the parent to measure the device's memory from then on.
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
    """A kind cannot be measured on this machine; the message is the reason."""


def options() -> argparse.ArgumentParser:
    """The options that the parent passes on to a child."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default: 10)")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before them (default: 3)")
    parser.add_argument("--steps", type=int, default=30, help="steps of a picture (default: 30)")
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp16", help="default: fp16")
    return parser


def figures(
    step: Call, switch: Call, picture: Call, args: argparse.Namespace, settle: Call = lambda: None
) -> dict[str, float]:
    """Medians of a step and of a change of subject in ms, seconds of one picture, host memory in GB.

    Args:
        step: computes one step; called `warm_up + rounds` times.
        switch: changes the subject, until it is ready for its first step.
        picture: computes all steps of one picture, from noise to latents.
        settle: frees memory that only the warm-up needed.
    """
    for _ in range(args.warm_up):
        step()
    settle()
    print(MEASURING, flush=True)
    steps = [report.milliseconds(step) for _ in range(args.rounds)]
    switches = [report.milliseconds(switch) for _ in range(args.warm_up + args.rounds)]
    seconds = report.milliseconds(picture) / 1000
    times = {"step_ms": median(steps), "switch_ms": median(switches[args.warm_up :]), "picture_s": seconds}
    return times | {"peak_gb": report.peak_bytes() / 1e9}


def device(torch: Any, args: argparse.Namespace) -> str:
    """The device of PyTorch: "cuda", or "cpu" with --quick.

    Raises:
        Absent: PyTorch sees no GPU.
    """
    if torch.cuda.is_available():
        return "cuda"
    if args.quick:
        return "cpu"
    raise Absent(f"PyTorch {torch.__version__} sees no GPU")


def last_words(text: str) -> str:
    """The error at the end of a command's output: our three lines, or the last three lines."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-3:])
