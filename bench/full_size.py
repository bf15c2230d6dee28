"""Exports, verifies and runs SD1.5 and SDXL at full size, with random weights.

    python bench/full_size.py --family sd15|sdxl [--work DIR]

    export_s, export_peak_gb       `hyperrt export --random-weights 0 --verify none`, the whole process
    bundle_gb                      on disk
    parity_fp32_worst_rel          largest error of a graph of the fp32 bundle, on ONNX Runtime, to PyTorch
    parity_bf16_worst_rel          the same for a bf16 bundle on OpenVINO
    step_s_onnxruntime, step_s_openvino    one step of HM-CFG, three rows, of the fp32 bundle; OpenVINO in
                                           bf16 if the processor has it
    peak_gb_onnxruntime, peak_gb_openvino  of that process

Each part runs in a separate process, so that peaks do not mix. `--work` keeps the bundles; bundles that it
already holds are reused, without figures of the export.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import report

BACKENDS = ("onnxruntime", "openvino")
PARITY_OF = ("fp32", "bf16")
BARS = {
    "export_peak_gb": "< 12",
    "parity_fp32_worst_rel": "<= 1e-4",
    "parity_bf16_worst_rel": "<= 5e-2",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("tiny", "sd15", "sdxl"), default="sd15")
    parser.add_argument("--work", type=Path, help="folder that keeps the bundles")
    parser.add_argument("--size", type=int, help="pixels; default: the family's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--only", choices=("export", "parity", "step"), help="measure this part alone")
    parser.add_argument("--quick", action="store_true", help="run the minimum, to test the script")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.family, args.rounds, args.warm_up = "tiny", 1, 0
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        args.work.mkdir(exist_ok=True)
        report.finish(__file__, figures(args), BARS)


def figures(args: argparse.Namespace) -> dict[str, float]:
    """All figures of a family."""
    results: dict[str, float] = {}
    for precision in PARITY_OF if args.only in (None, "parity") else ("fp32",):
        if not (bundle_of(args, precision) / "bundle.json").exists():
            exported = child(args, f"export_{precision}")
            if precision == "fp32":
                results |= exported
    files = bundle_of(args, "fp32").iterdir()
    results["bundle_gb"] = sum(path.stat().st_size for path in files) / 1e9
    if args.only in (None, "parity"):
        results |= child(args, "parity")
    for backend in BACKENDS if args.only in (None, "step") else ():
        results |= child(args, f"step_{backend}")
    return results


def bundle_of(args: argparse.Namespace, precision: str) -> Path:
    return args.work / f"{args.family}-{args.size or 'full'}-{precision}"


def child(args: argparse.Namespace, part: str) -> dict[str, float]:
    """Runs a part in a separate process; returns its figures."""
    size = ("--size", str(args.size)) if args.size else ()
    rounds = ("--rounds", str(args.rounds), "--warm-up", str(args.warm_up))
    command = (sys.executable, __file__, "--family", args.family, "--work", args.work, *size, *rounds)
    done = subprocess.run((*command, "--child", part), stdout=subprocess.PIPE, text=True, check=True)
    results: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(part, results, file=sys.stderr, flush=True)
    return results


def export(args: argparse.Namespace, precision: str) -> dict[str, float]:
    """Exports a bundle with the command line."""
    size = ("--size", str(args.size)) if args.size else ()
    command = (
        sys.executable, "-m", "hyperrt", "export", "--model", args.family, "--random-weights", "0",
        "--precision", precision, "--verify", "none", "-o", bundle_of(args, precision), *size,
    )  # fmt: skip
    start = perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, cwd=report.ROOT, check=True)
    # The peak of the largest child: the exporter.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"export_s": perf_counter() - start, "export_peak_gb": peak / 1e9}


def parity(args: argparse.Namespace) -> dict[str, float]:
    """Compares the graphs of both bundles with PyTorch; one network in memory at a time."""
    from hyperrt.export import expected, families, graph_specs, verify
    from hyperrt.export.source import sized

    errors: dict[str, dict[str, float]] = {precision: {} for precision in PARITY_OF}
    source = sized(families.get(args.family).random(0), args.size)
    for graph in graph_specs.build(source):
        modules = {name: source.parts[name].load() for name in graph.parts}
        results = expected.of_graph(graph, source, modules, verify.LARGE_SIZES)
        del modules
        for precision in PARITY_OF:
            path = bundle_of(args, precision) / f"{graph.name}.onnx"
            error = verify.graph_error(path, expected=results, **verify.RUN_BY[precision])
            print(f"{graph.name:16}{precision} {error:.2e}", file=sys.stderr, flush=True)
            errors[precision][graph.name] = error
    return {f"parity_{precision}_worst_rel": max(by_graph.values()) for precision, by_graph in errors.items()}


def step(args: argparse.Namespace, backend: str) -> dict[str, float]:
    """Times the fp32 denoiser on three rows, with the inputs bound that do not change in a loop."""
    from fused_step import random_constants, random_latents

    from hyperrt import engines
    from hyperrt.bundle.bundle import Bundle

    bundle = Bundle.open(bundle_of(args, "fp32"))
    sizes = {"images": 1, "branches": 3, "rows": 3, "subjects": 1}
    path = bundle.path / bundle.graphs["denoiser"].file
    with engines.open(path, backend, sizes=sizes) as engine:
        engine.bind(random_constants(bundle))
        feeds = random_latents(bundle)
        times = [report.milliseconds(lambda: engine.run(feeds)) for _ in range(args.warm_up + args.rounds)]
    seconds = median(times[args.warm_up :]) / 1000
    return {f"step_s_{backend}": seconds, f"peak_gb_{backend}": report.peak_bytes() / 1e9}


CHILDREN = {
    "export_fp32": lambda args: export(args, "fp32"),
    "export_bf16": lambda args: export(args, "bf16"),
    "parity": parity,
    **{f"step_{backend}": lambda args, backend=backend: step(args, backend) for backend in BACKENDS},
}

if __name__ == "__main__":
    main()
