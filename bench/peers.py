"""Times a step of HM-CFG in HyperRT and its peers.  Stable Diffusion 1.5, 512 x 512, random weights.

Seconds per branch of the guidance sum, median of `--rounds` after two warm-up rounds.  The peers run one
after the other, each in a separate environment and process, with the same number of threads, in fp32, and in
bf16 if the processor has it (`--precision`):

    ours_s                    one call of three rows, the LoRA on one of them (bench/peer_ours.py)
    diffusers_toggle_s        one UNet, three calls, PEFT adapter on and off
    diffusers_two_unets_s     two UNets, one with the LoRA fused, base calls as two rows
    openvino_genai_s          openvino.genai's pipeline with a LoRA adapter: its pair of rows divided by two.
                              The LoRA is on both rows: it cannot do HM-CFG
    openvino_genai_fuse_s     the same with the LoRA merged, so that the subject cannot change
    onnxruntime_s             the plain UNet as torch exports it, one row a call, no LoRA; fp32, the
                              only precision of its CPU kernels

    NAME_PRECISION_s          in that precision; NAME_s is the faster one.  Ours is the faster backend; each
                              backend has figures, too, such as ours_openvino_bf16_s
    vs_NAME                   ours / the peer's, each in its faster precision
    vs_NAME_PRECISION         the same at equal precision

The machine must be idle: next to another job torch's threads wait for one another, and a step takes three
times as long.  Without `--bundle` a bundle of random weights is exported to .peers/bundles/sd15.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import peer_environment
import report

from hyperrt.engines.cpu import multiplies_bf16

BARS = {"vs_openvino_genai": "<= 0.9", "vs_diffusers_toggle": "<= 0.3", "vs_diffusers_two_unets": "< 1"}
BARS |= {"vs_onnxruntime": "< 1"}
BACKENDS = {"onnxruntime": ("fp32",), "openvino": ("fp32", "bf16")}
PRECISIONS = ("fp32", "bf16")
# name -> environment, options, branches in a timed step, precisions
MEASURED = {
    "diffusers_toggle": ("diffusers", "step --way toggle", 3, PRECISIONS),
    "diffusers_two_unets": ("diffusers", "step --way two_unets", 3, PRECISIONS),
    "openvino_genai": ("openvino_genai", "step --mode auto", 2, PRECISIONS),
    "openvino_genai_fuse": ("openvino_genai", "step --mode fuse", 2, PRECISIONS),
    "onnxruntime": ("onnxruntime", "step", 1, ("fp32",)),
}


def main() -> None:
    parser = report.options(__doc__)
    parser.set_defaults(bundle=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=peer_environment.cpus())
    parser.add_argument("--only", nargs="*", choices=MEASURED, help="measure these peers alone")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS[: 1 + multiplies_bf16()],
        help="default: fp32, and bf16 if the processor has it",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=300, help="seconds after which no round begins")
    args = parser.parse_args()
    only = [] if args.quick else list(MEASURED) if args.only is None else args.only
    options = ["--rounds", str(1 if args.quick else args.rounds), "--threads", str(args.threads)]
    bundle = args.bundle or ("tiny" if args.quick else peer_environment.bundle("sd15"))
    rows = []
    figures: dict[str, float] = {}
    for precision in args.precision:
        for backend in [name for name, takes in BACKENDS.items() if find_spec(name) and precision in takes]:
            results = ours(str(bundle), backend, precision, options)
            figures[f"ours_{backend}_{precision}_s"] = results["median_s"]
            rows.append(row(f"ours_{backend}", precision, results))
        for name in [name for name in only if precision in MEASURED[name][3]]:
            results = measure(name, precision, [*options, "--limit", str(args.limit)])
            figures[f"{name}_{precision}_s"] = results["median_s"]
            rows.append(row(name, precision, results))
    report.table(rows, ("program", "precision", "s per branch", "min s", "rounds", "load", "versions"))
    report.finish(__file__, with_ratios(figures), BARS)


def ours(bundle: str, backend: str, precision: str, options: list[str]) -> dict[str, object]:
    """Our step on a backend, per branch."""
    script = str(peer_environment.BENCH / "peer_ours.py")
    command = [sys.executable, script, bundle, "--backend", backend, "--precision", precision, *options]
    versions = {"versions": {backend: report.version(backend)}}
    return per_branch(peer_environment.run(command), 3) | versions


def measure(name: str, precision: str, options: list[str]) -> dict[str, object]:
    """One peer's step, per branch."""
    environment, arguments, branches, precisions = MEASURED[name]
    folder = peer_environment.model("sd15", *dict.fromkeys(("diffusers", "lora", environment)))
    what, *others = arguments.split()
    others += ["--precision", precision] if len(precisions) > 1 else []
    results = peer_environment.call(
        environment, f"peer_{environment}.py", what, str(folder), *others, *options
    )
    return per_branch(results, branches)


def per_branch(results: dict[str, object], branches: int) -> dict[str, object]:
    """Divides the times of a step by its branches."""
    return results | {key: results[key] / branches for key in ("median_s", "least_s")}


def row(name: str, precision: str, results: dict[str, object]) -> tuple[object, ...]:
    """A row of the table; a load above the number of CPUs shows that another job was running."""
    versions = " ".join(f"{package} {number}" for package, number in results["versions"].items())
    times = (results["median_s"], results["least_s"], results["rounds"])
    return name, precision, *times, os.getloadavg()[0], versions


def with_ratios(figures: dict[str, float]) -> dict[str, float]:
    """Adds the fastest figure of each name, and the ratios of ours to each peer's."""
    results = dict(figures)
    for name in ("ours", *MEASURED):
        for precision in PRECISIONS:
            kinds = [f"{name}_{backend}" for backend in BACKENDS] if name == "ours" else [name]
            times = [figures[key] for kind in kinds if (key := f"{kind}_{precision}_s") in figures]
            if times:
                results[f"{name}_{precision}_s"] = min(times)
        both = [results[key] for precision in PRECISIONS if (key := f"{name}_{precision}_s") in results]
        if both:
            results[f"{name}_s"] = min(both)
    ratios = {}
    for name in MEASURED:
        for kind in ("", *(f"_{precision}" for precision in PRECISIONS)):
            if {f"ours{kind}_s", f"{name}{kind}_s"} <= results.keys():
                ratios[f"vs_{name}{kind}"] = results[f"ours{kind}_s"] / results[f"{name}{kind}_s"]
    return results | ratios


if __name__ == "__main__":
    main()
