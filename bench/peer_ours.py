"""Times a step of HM-CFG in HyperRT, as the scripts of the peers do, in the project's environment.

    python peer_ours.py BUNDLE --backend openvino --precision bf16 [--threads 2] [--rounds 5] [--warm-up 2]

The step is the time between two latents of `Runtime.sample`: three rows, the LoRA on one of them, guidance
and solver included.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from hyperrt import Runtime
from hyperrt.bundle.bundle import Bundle
from hyperrt.engines.backends import BACKENDS, resolve
from hyperrt.lora.layout import VECTORS
from hyperrt.lora.subject import Subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    args = parser.parse_args()
    times = []
    # ONNX Runtime computes in the precision of the graph, fp32 in these bundles.
    takes_precision = bool(BACKENDS[resolve(args.backend)].precisions)
    chosen = {"precision": args.precision.replace("fp", "f")} if takes_precision else {}
    with Runtime.open(args.bundle, args.backend, args.threads, backend_options=chosen) as runtime:
        steps = args.warm_up + args.rounds
        subject = random_subject(runtime.bundle, 0)
        loop = runtime.sample(runtime.request("a [V] on a beach", subject, steps=steps, seed=0))
        for turn in range(steps):
            start = perf_counter()
            next(loop)
            elapsed = perf_counter() - start
            print(f"round {turn}: {elapsed:.4f} s", file=sys.stderr, flush=True)
            if turn >= args.warm_up:
                times.append(elapsed)
    results = {"median_s": median(times), "least_s": min(times), "rounds": len(times)}
    print(json.dumps(results))


def random_subject(bundle: Bundle, seed: int) -> Subject:
    """A Gaussian LoRA for a bundle, small compared with its weights."""
    rng = np.random.default_rng(seed)
    vectors = {name: 0.01 * rng.standard_normal(bundle.layout.size(name), np.float32) for name in VECTORS}
    return Subject(vectors, "cat", 1, {"base_model": bundle.hashes.base_model})


if __name__ == "__main__":
    main()
