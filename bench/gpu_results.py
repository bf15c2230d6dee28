"""The results of bench/gpu.py: figures, reasons of absent kinds, the file of both, and ratios."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import report

RESULTS = report.ROOT / "bench" / "results"
PACKAGES = (
    "torch",
    "diffusers",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
)
COLUMNS = {"step_ms": "step ms", "switch_ms": "switch ms", "picture_s": "picture s", "peak_gb": "peak GB"}
NAIVE = ("compile_naive", "reduce_naive")


class Results:
    """Figures by key, and reasons by "FAMILY_KIND"; written to the file after every kind.

    Args:
        driver: of `hyperrt.engines.nvidia.driver`; None on a CPU.
        path: the file; None: bench/results/gpu-CARD.json, and no file on a CPU.
    """

    def __init__(self, driver: Any, path: Path | None) -> None:
        card = driver.gpus[0].name if driver else "none"
        self.path = path or (RESULTS / f"gpu-{slug(card)}.json" if driver else None)
        self.about = {
            "bench": "gpu",
            "commit": report.commit(),
            "machine": report.machine(),
            "card": card,
            "driver": f"{driver.version}, CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver else "none",
            "versions": {package: number for package in PACKAGES if (number := version_of(package))},
        }
        self.figures: dict[str, float] = {}
        self.absent: dict[str, str] = {}
        if self.path and self.path.is_file():
            former = json.loads(self.path.read_text(encoding="utf-8"))
            if all(former.get(key) == self.about[key] for key in ("commit", "card")):
                self.figures, self.absent = former["figures"], former["absent"]

    def add(self, family: str, kind: str, results: dict[str, Any]) -> None:
        """Adds the results of a kind, in place of former ones."""
        name = f"{family}_{kind}"
        fields = [*COLUMNS, "compile_s", "tflop", "tflop_s"]
        for field in fields:
            self.figures.pop(f"{name}_{field}", None)
        self.absent.pop(name, None)
        if "absent" in results:
            self.absent[name] = results["absent"]
        else:
            self.figures |= {f"{name}_{field}": value for field, value in results.items()}
        self.write()

    def write(self) -> None:
        """Writes the file; does nothing on a CPU."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {**self.about, "figures": self.figures, "absent": self.absent}
            self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def version_of(package: str) -> str:
    """The version of a package; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def slug(card: str) -> str:
    """The name of a GPU as part of a file name: "NVIDIA H100 80GB HBM3" => "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def tables(results: Results, families: Sequence[str], kinds: Sequence[str]) -> None:
    """Prints a table of the figures, and the reasons of absent kinds."""
    figures, rows = results.figures, []
    for name in (f"{family}_{kind}" for family in families for kind in kinds):
        if f"{name}_step_ms" in figures:
            rows.append((name, *(figures.get(f"{name}_{field}", "") for field in COLUMNS)))
    report.table(rows, ("kind", *COLUMNS.values()))
    for name, reason in results.absent.items():
        print(f"absent: {name}: {reason}")
    print()


def summary(figures: dict[str, float], ours: Collection[str]) -> dict[str, float]:
    """Ratios of our fastest kind to the floor and to torch.compile, and its change of subject.

    Args:
        ours: the kinds of HyperRT.
    """
    ratios: dict[str, float] = {}
    for family in ("tiny", "sd15", "sdxl"):  # the largest is the last
        steps = {kind: figures[key] for kind in ours if (key := f"{family}_{kind}_step_ms") in figures}
        if not steps:
            continue
        fastest = min(steps, key=steps.__getitem__)
        ratios["switch_ms"] = figures[f"{family}_{fastest}_switch_ms"]
        if f"{family}_floor_step_ms" in figures:
            ratios[f"{family}_step_over_floor"] = steps[fastest] / figures[f"{family}_floor_step_ms"]
        theirs = [figures[key] for kind in NAIVE if (key := f"{family}_{kind}_step_ms") in figures]
        ratios.pop("vs_compile_naive", None)
        if theirs:
            ratios["vs_compile_naive"] = steps[fastest] / min(theirs)
    return ratios
