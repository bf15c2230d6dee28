"""A lower bound for the time of a step: its operations at the rate of large matrix products.

PyTorch counts the operations of the `denoiser` graph with three rows on tensors without data; without the
export package they are those of `COUNTED`.  The rate is that of a product of two square matrices, in the
faster half precision.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import gpu_timing
import report

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
except ModuleNotFoundError as error:
    raise gpu_timing.Absent(
        "the rate of this device is measured with PyTorch, which is not installed"
    ) from error

# Operations of a step, three rows, at the family's size; tests/test_bench_gpu.py counts them again.
COUNTED = {"sd15": 2_206_296_309_760, "sdxl": 19_746_230_108_160}
SIDE = {"cuda": 8192, "cpu": 512}
TYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float32,)}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step at the device's rate, its operations, and the rate."""
    device = gpu_timing.device(torch, args)
    rates = [rate(device, dtype, args) for dtype in TYPES[device]]
    try:
        operations = counted(args.family)
    except ModuleNotFoundError:
        if args.family not in COUNTED:
            raise
        operations = COUNTED[args.family]
    return {
        "step_ms": 1000 * operations / max(rates),
        "tflop": operations / 1e12,
        "tflop_s": max(rates) / 1e12,
    }


def rate(device: str, dtype: torch.dtype, args: argparse.Namespace) -> float:
    """Operations per second of a large matrix product, median."""
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    times = [report.milliseconds(product) for _ in range(args.warm_up + args.rounds)]
    return 2 * side**3 / (median(times[args.warm_up :]) / 1000)


def counted(family: str) -> int:
    """Operations of a step with three rows, one picture; a multiplication and an addition are two."""
    from hyperrt.export import families, graph_specs
    from hyperrt.export.parts import FAKE

    source = families.get(family).random(0)
    graph: Any = next(graph for graph in graph_specs.build(source) if graph.name == "denoiser")
    module = graph.make({"unet": source.parts["unet"].skeleton})
    feeds = graph.feeds({"images": 1, "branches": 3, "rows": 3, "subjects": 1}, seed=0)
    # The counter does not know the fused attention of the CPU.
    with torch.no_grad(), FAKE, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**{name: FAKE.from_tensor(tensor) for name, tensor in feeds.items()})
    return int(counter.get_total_flops())
