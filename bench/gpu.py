"""What does a step cost on an NVIDIA GPU, here and in PyTorch?  SD1.5 at 512, SDXL at 1024, random weights.

    python bench/gpu.py [--families sd15 sdxl] [--only KIND ...] [--results FILE]
    python bench/gpu.py --bundle-sd15 DIR --bundle-sdxl DIR        where nothing can be exported

Three rows of HM-CFG, one picture.  Each kind runs in a process of its own, with a time limit, one after the
other; what cannot be installed or run is absent, with the reason.

    eager_naive, eager_rows      PyTorch: two calls with the LoRA off and on, or one call of three rows
    compile_naive, compile_rows  the same by torch.compile, mode max-autotune-no-cudagraphs
    reduce_naive, reduce_rows    the same, mode reduce-overhead
    onnxruntime_cuda, onnxruntime_cuda_graph            HyperRT on ONNX Runtime, without and with a CUDA graph
    tensorrt_inputs, tensorrt_refit                     HyperRT on TensorRT
    tensorrt_rtx_inputs, tensorrt_rtx_refit             HyperRT on TensorRT-RTX
    floor                        the step's operations at the measured rate of a large product

    FAMILY_KIND_step_ms, _switch_ms   median; switch: another subject, ready for its first step
    FAMILY_KIND_picture_s        30 steps, from noise to latents
    FAMILY_KIND_peak_gb          device memory from the first step that counts, over what was in use before
    FAMILY_KIND_compile_s        `hyperrt compile` for this card
    sdxl_step_over_floor         HyperRT's fastest kind over the floor (of --quick: tiny_step_over_floor)
    switch_ms                    of that kind, in the largest family
    vs_compile_naive             its step over that of two calls in the faster mode of torch.compile, there

Bundles that are not given are exported to --work; those with the LoRA as refittable weights lie beside the
others, in DIR-refit.  --results keeps all of it with the card, the versions and the reasons; figures of the
same commit and card that are there stay, so that a run of one kind adds to it.  Without a GPU it ends with 7,
at once; --quick measures what a CPU can, on the small bundle.
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
# kind -> module of this folder, and the options of its `measure`
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
    "onnxruntime_cpu": ("gpu_engines", {"backend": "onnxruntime"}),  # of --quick
}
OURS = tuple(kind for kind, (module, _) in KINDS.items() if module == "gpu_engines")
QUICK = ("floor", "eager_naive", "eager_rows", "compile_naive", "compile_rows", "onnxruntime_cpu")
QUICK += ("tensorrt_rtx_inputs",)  # absent, for want of a GPU
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
    found = gpu_results.Results(driver, args.results)
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        args.work.mkdir(parents=True, exist_ok=True)
        for family in args.families:
            for kind in args.only:
                found.add(family, kind, gpu_children.measured(args, family, kind))
    gpu_results.tables(found, args.families, args.only)
    report.finish(__file__, found.figures | gpu_results.summary(found.figures, OURS), BARS)


def parsed() -> argparse.Namespace:
    """The options; --quick chooses the family and the kinds."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[gpu_timing.options()],
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[*KINDS][:-1], metavar="KIND")
    parser.add_argument("--bundle-sd15", type=Path, metavar="DIR")
    parser.add_argument("--bundle-sdxl", type=Path, metavar="DIR")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps the bundles that are exported")
    parser.add_argument("--results", type=Path, metavar="FILE", help="(default: bench/results/gpu-CARD.json)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of a kind (default: 1800)")
    parser.add_argument(
        "--quick", action="store_true", help="the least of everything: is the script in order?"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--family", help=argparse.SUPPRESS)
    parser.add_argument("--bundle", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.families, args.only = ["tiny"], list(QUICK)
        args.rounds, args.warm_up, args.steps, args.precision = 2, 1, 2, "fp32"
    return args


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one kind, or why there are none."""
    module, options = KINDS[args.child]
    try:
        found: dict[str, Any] = importlib.import_module(module).measure(args, **options)
        return found
    except (gpu_timing.Absent, HyperRTError) as error:
        return {"absent": str(error)}
    except Exception as error:  # of a vendor's package; a kind that fails must not end the others
        traceback.print_exc()
        return {"absent": f"{type(error).__name__}: {str(error)[:500]}"}


if __name__ == "__main__":
    main()
