"""Times HyperRT on a backend: steps of the runtime's loop with three rows, and changes of subject.

The step is the time between two latents of `Runtime.sample`, on the host.  A change of subject is
`Runtime.prepare` with another LoRA and the same prompt, until the device is done.  Plans are compiled with
`hyperrt compile`, in a separate process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from time import perf_counter
from typing import Any

import gpu_timing
import numpy as np
import peer_ours
import report

from hyperrt import Runtime
from hyperrt.engines.backends import BACKENDS

PROMPT = "a [V] on a beach"


def measure(args: argparse.Namespace, backend: str, **options: Any) -> dict[str, float]:
    """Figures of a backend on the bundle `args.bundle`.

    Args:
        options: of the backend.
    """
    results: dict[str, float] = {}
    if BACKENDS[backend].runs_plans:
        start = perf_counter()
        compile_bundle(args.bundle, backend)
        results["compile_s"] = perf_counter() - start
    with Runtime.open(args.bundle, backend, backend_options=options) as runtime:
        pair = [peer_ours.random_subject(runtime.bundle, seed) for seed in (0, 1)]
        subjects = cycle(pair[::-1])
        runtime.prepare(runtime.request(PROMPT, pair[0]))
        loop = runtime.sample(runtime.request(PROMPT, pair[0], steps=args.warm_up + args.rounds, seed=0))
        wait = synchronize(backend)

        def step() -> None:
            np.asarray(next(loop).latents)  # the copy from a device waits for it

        def picture() -> None:
            # Without the decoder, which runs only if the iteration goes on.
            steps = runtime.sample(runtime.request(PROMPT, pair[0], steps=args.steps, seed=0))
            for _ in range(args.steps):
                last = next(steps)
            np.asarray(last.latents)

        def switch() -> None:
            runtime.prepare(runtime.request(PROMPT, next(subjects)))
            wait()

        return results | gpu_timing.figures(step, switch, picture, args)


def synchronize(backend: str) -> Callable[[], object]:
    """A function that waits for the device; ONNX Runtime returns when it is done."""
    if not BACKENDS[backend].runs_plans:
        return lambda: None
    from cuda.bindings import runtime as cudart

    return cudart.cudaDeviceSynchronize


def compile_bundle(bundle: str, backend: str) -> None:
    """Compiles the plans of all graphs for this machine.

    Raises:
        Absent: the command failed; with its error.
    """
    command = (
        sys.executable,
        "-m",
        "hyperrt",
        "compile",
        bundle,
        "--backend",
        backend,
        "--target",
        "current",
    )
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=False)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise gpu_timing.Absent(gpu_timing.last_words(done.stderr) or f"exit code {done.returncode}")
