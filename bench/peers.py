"""What does a step of HM-CFG cost here and elsewhere?  Stable Diffusion 1.5, 512 x 512, random weights.

Seconds per branch of the guidance sum, median of `--rounds` after two that are not counted.  Each peer runs
in its own environment and process, one after the other in one run, with as many threads:

    ours_s                    one call of three rows, the LoRA on one of them (bench/peer_ours.py); the faster
                              backend of those installed, each beside it: ours_onnxruntime_s, ours_openvino_s
    diffusers_toggle_s        one UNet, three calls, PEFT adapter on and off; the faster of fp32 and bf16, and
                              each: diffusers_toggle_fp32_s, diffusers_toggle_bf16_s
    diffusers_two_unets_s     two UNets, one with the LoRA fused, base calls as two rows; fp32
    openvino_genai_s          openvino.genai's pipeline with a LoRA adapter: its pair of rows divided by two.
                              The LoRA is on both rows: it cannot do HM-CFG
    openvino_genai_fuse_s     the same with the LoRA merged for good, which no subject can follow
    onnxruntime_s             the plain UNet as torch exports it, one row a call, no LoRA
    vs_NAME                   ours_s / the peer's; vs_diffusers_bf16 is of the toggled bf16

All compute in fp32, but for the figure of bf16, which a CPU without bf16 arithmetic emulates, some seven
times slower (`--limit` gives it fewer rounds).  The machine must have nothing else to do: beside another job
torch's threads wait for one another, and a step takes three times as long.  The bundle is `--bundle`, or
exported from random weights to .peers/bundles/sd15.  Times say nothing about pictures.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import peer_environment
import report

BARS = {"vs_openvino_genai": "<= 0.9", "vs_diffusers_toggle": "<= 0.3", "vs_diffusers_two_unets": "< 1"}
BARS |= {"vs_onnxruntime": "< 1"}
PEERS = ("diffusers_toggle", "diffusers_two_unets", "openvino_genai", "openvino_genai_fuse", "onnxruntime")
BACKENDS = ("onnxruntime", "openvino")
# figure -> environment, script, its options, branches in a step as it is timed
MEASURED = {
    "diffusers_toggle_fp32_s": ("diffusers", "step --way toggle --precision fp32", 3),
    "diffusers_two_unets_s": ("diffusers", "step --way two_unets --precision fp32", 3),
    "diffusers_toggle_bf16_s": ("diffusers", "step --way toggle --precision bf16", 3),
    "openvino_genai_s": ("openvino_genai", "step --mode auto", 2),
    "openvino_genai_fuse_s": ("openvino_genai", "step --mode fuse", 2),
    "onnxruntime_s": ("onnxruntime", "step", 1),
}


def main() -> None:
    parser = report.options(__doc__)
    parser.set_defaults(bundle=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=peer_environment.cpus())
    parser.add_argument("--only", nargs="*", choices=MEASURED, help="of the peers, measure these alone")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which no round begins")
    args = parser.parse_args()
    only = [] if args.quick else list(MEASURED) if args.only is None else args.only
    how = ["--rounds", str(1 if args.quick else args.rounds), "--threads", str(args.threads)]
    bundle = args.bundle or ("tiny" if args.quick else peer_environment.bundle("sd15"))
    figures, rows = ours(str(bundle), how)
    for figure in MEASURED:
        if figure in only:
            found = measure(figure, [*how, "--limit", str(args.limit)])
            figures[figure] = found["median_s"]
            rows.append(row(figure, found))
    report.table(rows, ("figure", "s per branch", "least", "rounds", "load", "precision", "versions"))
    report.finish(__file__, with_ratios(figures), BARS)


def ours(bundle: str, how: list[str]) -> tuple[dict[str, float], list[tuple[object, ...]]]:
    """The step on every backend that is installed, and the best of them; rows for the table."""
    figures: dict[str, float] = {}
    rows: list[tuple[object, ...]] = []
    script = str(peer_environment.BENCH / "peer_ours.py")
    for backend in BACKENDS:
        if find_spec(backend):
            found = peer_environment.run([sys.executable, script, bundle, "--backend", backend, *how])
            found = per_branch(found, 3) | {"versions": {backend: report.version(backend)}}
            figures[f"ours_{backend}_s"] = found["median_s"]
            rows.append(row(f"ours_{backend}_s", found))
    return {"ours_s": min(figures.values()), **figures}, rows


def measure(figure: str, how: list[str]) -> dict[str, object]:
    """One peer's step, per branch."""
    name, options, branches = MEASURED[figure]
    folder = peer_environment.model("sd15", *dict.fromkeys(("diffusers", "lora", name)))
    what, *others = options.split()
    found = peer_environment.call(name, f"peer_{name}.py", what, str(folder), *others, *how)
    precision = "bf16" if "bf16" in options else "fp32"
    return per_branch(found, branches) | {"precision": precision}


def per_branch(found: dict[str, object], branches: int) -> dict[str, object]:
    """Times of a step as times of a branch."""
    return found | {key: found[key] / branches for key in ("median_s", "least_s")}


def row(figure: str, found: dict[str, object]) -> tuple[object, ...]:
    """A line of the table; a load beyond the CPUs says that something else was running."""
    load = os.getloadavg()[0]
    versions = " ".join(f"{name} {number}" for name, number in found["versions"].items())
    return figure, found["median_s"], found["least_s"], found["rounds"], load, found["precision"], versions


def with_ratios(figures: dict[str, float]) -> dict[str, float]:
    """The figures, the faster precision of diffusers as its figure, and ours over each peer's."""
    found = dict(figures)
    both = [figures[key] for p in ("fp32", "bf16") if (key := f"diffusers_toggle_{p}_s") in figures]
    if both:
        found["diffusers_toggle_s"] = min(both)
    ratios = {f"vs_{name}": found["ours_s"] / found[f"{name}_s"] for name in PEERS if f"{name}_s" in found}
    if "diffusers_toggle_bf16_s" in found:
        ratios["vs_diffusers_bf16"] = found["ours_s"] / found["diffusers_toggle_bf16_s"]
    return found | ratios


if __name__ == "__main__":
    main()
