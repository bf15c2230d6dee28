"""Compiles plans of TensorRT-RTX ahead of time, on a machine without a GPU.

    python bench/compile.py --family tiny,sd15,sdxl [--target sm86,sm89,sm120] [--work DIR]

    compiled                  how many of the (family, target) pairs compiled whole
    seconds_FAMILY_TARGET     all graphs
    peak_gb_FAMILY_TARGET     peak memory of the process that compiles the largest graph
    plan_gb_FAMILY_TARGET     all plans
    lora_sites_FAMILY_TARGET  sites whose LoRA is an input of a plan, so that a subject needs no refit
    sites_FAMILY              sites of the family's layout

SD1.5 and SDXL have random weights and graphs in bf16; tiny is the bundle in the wheel, in fp32. Bundles are
written to `--work` (default: a temporary folder); bundles of earlier runs and of full_size.py are reused.
Plans are not kept, and graphs are compiled one by one: SDXL's plans are some 10 GB for each target.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report

from hyperrt.bundle.bundle import Bundle

TARGETS = "sm86,sm89,sm120"
BARS = {"peak_gb_sdxl_sm86": "< 20", "peak_gb_sdxl_sm89": "< 20", "peak_gb_sdxl_sm120": "< 20"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="tiny,sd15,sdxl")
    parser.add_argument("--target", default=TARGETS)
    parser.add_argument("--work", type=Path, help="folder that keeps the bundles")
    parser.add_argument("--quick", action="store_true", help="tiny for one target, to test the script")
    args = parser.parse_args()
    families, targets = args.family.split(","), args.target.split(",")
    if args.quick:
        families, targets = ["tiny"], targets[:1]
    figures: dict[str, float] = {"compiled": 0, "wanted": len(families) * len(targets)}
    with tempfile.TemporaryDirectory() as folder:
        work = (args.work or Path(folder)).absolute()
        work.mkdir(exist_ok=True)
        for family in families:
            bundle = exported(family, work)
            figures[f"sites_{family}"] = len(bundle.layout.sites)
            for target in targets:
                plans = compiled(bundle, target, work)
                figures |= about(bundle, plans, f"{family}_{target}")
                figures["compiled"] += len(plans) == len(bundle.graphs)
    report.finish(__file__, figures, BARS | {"compiled": str(figures["wanted"])})


def exported(family: str, work: Path) -> Bundle:
    """The family's bundle, exported if it is missing."""
    if family == "tiny":
        return Bundle.open("tiny")
    folder = work / f"{family}-full-bf16"
    if not (folder / "bundle.json").exists():
        options = ("--random-weights", "0", "--precision", "bf16", "--verify", "none")
        hyperrt("export", "--model", family, *options, "-o", str(folder), work=work)
    return Bundle.open(folder)


def compiled(bundle: Bundle, target: str, work: Path) -> list[dict[str, Any]]:
    """Compiles all graphs; returns an event per plan, and prints errors to stderr."""
    path = "tiny" if bundle.family == "tiny" else str(bundle.path)
    events = []
    for name in bundle.graphs:
        options = ("--target", target, "--graph", name, "--force", "--json")
        events += hyperrt("compile", path, *options, work=work, check=False)
    for event in events:
        if event["event"] == "error":
            print(event["what"], event["why"], sep="\n", file=sys.stderr)
    return [event for event in events if event["event"] == "plan"]


def about(bundle: Bundle, plans: list[dict[str, Any]], key: str) -> dict[str, float]:
    """The figures of one family and target."""
    inputs = {name for plan in plans for name in plan["inputs"]}
    sites = sum(
        len(bundle.layout.sites_of(vector)) for vector in ("lora_q", "lora_kv") if vector in inputs
    )
    return {
        f"seconds_{key}": sum(plan["seconds"] for plan in plans),
        f"peak_gb_{key}": max((plan["peak_bytes"] for plan in plans), default=0) / 1e9,
        f"plan_gb_{key}": sum(plan["bytes"] for plan in plans) / 1e9,
        f"lora_sites_{key}": sites,
    }


def hyperrt(*arguments: str, work: Path, check: bool = True) -> list[dict[str, Any]]:
    """Runs the command line with a temporary HYPERRT_HOME; returns the JSON events that it prints."""
    print("hyperrt", *arguments, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=work) as home:
        done = subprocess.run(
            (sys.executable, "-m", "hyperrt", *arguments), cwd=report.ROOT,
            env=os.environ | {"HYPERRT_HOME": home}, stdout=subprocess.PIPE, text=True, check=check,
        )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main()
