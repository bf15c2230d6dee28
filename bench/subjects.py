"""Times calls for several subjects.  The (subject, prompt) pairs share every engine call.

    per_subject_s_1 … per_subject_s_8
                           seconds of one picture, steps and decoding, when K subjects are drawn by one call:
                           time of the call / K, K = 1, 2, 4, 8; median of `--rounds`
    mb_per_extra_subject   peak memory with 8 subjects minus that with 1, / 7, in 10^6 bytes
    growth                 per_subject_s_8 / per_subject_s_1

Every K runs in a separate process, so that peaks do not mix.  Subjects are different random LoRAs, prompts
differ in the place.  A step has three rows for every subject.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import peer_environment
import peer_ours
import report

from hyperrt import Runtime

BARS = {"growth": "<= 1"}
COUNTS = (1, 2, 4, 8)
PLACES = ("beach", "table", "meadow", "roof", "street", "boat", "rug", "hill")


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, help="default: the bundle's; 2 are enough for a full-size bundle"
    )
    parser.add_argument("--count", type=int, help="measure this number of subjects, in this process")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.warm_up, args.steps = 1, 0, 2
    if args.count:
        print(json.dumps(measure(args, args.count)))
        return
    figures, rows = {}, []
    results = {count: measured_alone(args, count) for count in ((1, 8) if args.quick else COUNTS)}
    for count, result in results.items():
        figures[f"per_subject_s_{count}"] = result["seconds"] / count
        rows.append((count, result["seconds"], result["seconds"] / count, result["peak_mb"]))
    report.table(rows, ("subjects", "s of a call", "s per subject", "peak MB"))
    few, many = min(results), max(results)
    figures["mb_per_extra_subject"] = (results[many]["peak_mb"] - results[few]["peak_mb"]) / (many - few)
    figures["growth"] = figures[f"per_subject_s_{many}"] / figures[f"per_subject_s_{few}"]
    report.finish(__file__, figures, BARS)


def measured_alone(args: argparse.Namespace, count: int) -> dict[str, float]:
    """Measures one count in a separate process."""
    command = [sys.executable, __file__, "--bundle", args.bundle, "--backend", args.backend]
    command += ["--rounds", str(args.rounds), "--warm-up", str(args.warm_up), "--count", str(count)]
    return peer_environment.run(command + (["--steps", str(args.steps)] if args.steps else []))


def measure(args: argparse.Namespace, count: int) -> dict[str, float]:
    """Seconds of a call with `count` subjects, and the peak memory of this process in 10^6 bytes."""
    with Runtime.open(args.bundle, args.backend) as runtime:
        subjects = [peer_ours.random_subject(runtime.bundle, seed) for seed in range(count)]
        prompts = [f"a [V] on a {place}" for place in PLACES[:count]]
        times = [
            report.milliseconds(lambda: runtime.generate(prompts, subjects, steps=args.steps, seed=0)) / 1000
            for _ in range(args.warm_up + args.rounds)
        ]
    return {"seconds": median(times[args.warm_up :]), "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Peak of this process's resident memory, in 10^6 bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


if __name__ == "__main__":
    main()
