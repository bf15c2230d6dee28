"""Times a step on an NVIDIA GPU, in HyperRT and in PyTorch.  SD1.5 at 512, SDXL at 1024, random weights.

    python bench/gpu.py [--families sd15 sdxl] [--only KIND ...] [--results FILE]
    python bench/gpu.py --bundle-sd15 DIR --bundle-sdxl DIR        without an export

Three rows of HM-CFG, one picture.  Each kind runs in a separate process with a time limit, one after the
other.  A kind that cannot be installed or run is recorded as absent, with the reason.

    eager_naive, eager_rows      PyTorch: two calls with the LoRA off and on, or one call of three rows
    compile_naive, compile_rows  the same by torch.compile, mode max-autotune-no-cudagraphs
    reduce_naive, reduce_rows    the same, mode reduce-overhead
    onnxruntime_cuda, onnxruntime_cuda_graph            HyperRT on ONNX Runtime, without and with a CUDA graph
    tensorrt_inputs, tensorrt_refit                     HyperRT on TensorRT
    tensorrt_rtx_inputs, tensorrt_rtx_refit             HyperRT on TensorRT-RTX
    floor                        operations of the step / the measured rate of a large matrix product

    FAMILY_KIND_step_ms, _switch_ms   medians; switch: until another subject is ready for its first step
    FAMILY_KIND_picture_s        30 steps, from noise to latents
    FAMILY_KIND_peak_gb          peak device memory from the first timed step on, less that used before
    FAMILY_KIND_compile_s        `hyperrt compile` for this GPU
    sdxl_step_over_floor         HyperRT's fastest kind / floor (with --quick: tiny_step_over_floor)
    switch_ms                    the same kind's, in the largest family
    vs_compile_naive             the same kind's step / that of the faster mode of torch.compile in two calls

Without --bundle-FAMILY the bundle is exported to --work.  The bundle with the LoRA as refittable weights is
beside it, in DIR-refit.  --results also records the GPU, versions and reasons; a run of one kind adds to the
figures of the same commit and GPU.  Without a GPU the exit code is 7; --quick runs on a CPU with the small
bundle.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import gpu_children
import gpu_results
import gpu_timing
import report

from hyperrt.engines import EngineError
from hyperrt.engines.nvidia import driver as nvidia
from hyperrt.errors import HyperRTError

FAMILIES = ("sd15", "sdxl")
NAIVE, ROWS = {"way": "naive"}, {"way": "rows"}
AUTOTUNED, REDUCED = {"mode": "max-autotune-no-cudagraphs"}, {"mode": "reduce-overhead"}
CUDA = {"backend": "onnxruntime-cuda"}
# kind -> module in this folder, options of its `measure`
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "floor": ("gpu_floor", {}),
    "eager_naive": ("gpu_torch", NAIVE),
    "eager_rows": ("gpu_torch", ROWS),
    "compile_naive": ("gpu_torch", NAIVE | AUTOTUNED),
    "compile_rows": ("gpu_torch", ROWS | AUTOTUNED),
    "reduce_naive": ("gpu_torch", NAIVE | REDUCED),
    "reduce_rows": ("gpu_torch", ROWS | REDUCED),
    "onnxruntime_cuda": ("gpu_engines", CUDA),
    "onnxruntime_cuda_graph": ("gpu_engines", CUDA | {"cuda_graph": True}),
    "tensorrt_inputs": ("gpu_engines", {"backend": "tensorrt"}),
    "tensorrt_refit": ("gpu_engines", {"backend": "tensorrt"}),
    "tensorrt_rtx_inputs": ("gpu_engines", {"backend": "tensorrt-rtx"}),
    "tensorrt_rtx_refit": ("gpu_engines", {"backend": "tensorrt-rtx"}),
    "onnxruntime_cpu": ("gpu_engines", {"backend": "onnxruntime"}),  # with --quick
}
OURS = tuple(kind for kind, (module, _) in KINDS.items() if module == "gpu_engines")
QUICK = ("floor", "eager_naive", "eager_rows", "compile_naive", "compile_rows", "onnxruntime_cpu")
QUICK += ("tensorrt_rtx_inputs",)  # absent without a GPU
BARS = {"vs_compile_naive": "< 1"}


def main() -> None:
    args = parsed()
    if args.child:
        print(json.dumps(child(args)), flush=True)
        return
    try:
        driver = None if args.quick else nvidia.driver()
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from error
    results = gpu_results.Results(driver, args.results)
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        args.work.mkdir(parents=True, exist_ok=True)
        for family in args.families:
            for kind in args.only:
                results.add(family, kind, gpu_children.measured(args, family, kind))
    gpu_results.tables(results, args.families, args.only)
    report.finish(__file__, results.figures | gpu_results.summary(results.figures, OURS), BARS)


def parsed() -> argparse.Namespace:
    """The options, with those that --quick sets."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[gpu_timing.options()],
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[*KINDS][:-1], metavar="KIND")
    parser.add_argument("--bundle-sd15", type=Path, metavar="DIR")
    parser.add_argument("--bundle-sdxl", type=Path, metavar="DIR")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps the exported bundles")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default: bench/results/gpu-CARD.json")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a kind (default: 1800)")
    parser.add_argument("--quick", action="store_true", help="run the minimum, to test the script")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--family", help=argparse.SUPPRESS)
    parser.add_argument("--bundle", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.families, args.only = ["tiny"], list(QUICK)
        args.rounds, args.warm_up, args.steps, args.precision = 2, 1, 2, "fp32"
    return args


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one kind; returns its figures, or {"absent": reason}."""
    module, options = KINDS[args.child]
    try:
        figures: dict[str, Any] = importlib.import_module(module).measure(args, **options)
        return figures
    except (gpu_timing.Absent, HyperRTError) as error:
        return {"absent": str(error)}
    except Exception as error:  # from any package: the other kinds must still run
        traceback.print_exc()
        return {"absent": f"{type(error).__name__}: {str(error)[:500]}"}


if __name__ == "__main__":
    main()
