"""Two graphs that every backend opens (tests/engines/graphs/make.py), and how each opens them.

affine       y = x w + step lora, same = x
refittable   y = x w + b, w and b being constants that a refit replaces: at first ones and zeros
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.engines import TensorSpec
from hyperrt.engines.nvidia import tensorrt_build

GRAPHS = Path(__file__).parent / "engines" / "graphs"
# Backend -> its form of the graph.
FILES = {
    name: "affine.onnx" if backend.vendor else "affine.json" for name, backend in engines.BACKENDS.items()
}
REFITTABLE = {name: file.replace("affine", "refittable") for name, file in FILES.items()}
RANGES = {"rows": (1, 2, 8), "subjects": (1, 1, 8)}

W = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
X = np.arange(6, dtype=np.float32).reshape(2, 3)
LORA = np.array([[10, 20]], np.float32)
STEP = np.array(2, np.int64)
FEEDS = {"x": X, "lora": LORA, "step": STEP}
Y = X @ W + 2 * LORA
WEIGHTS = (TensorSpec("w", (3, 2), "float32"), TensorSpec("b", (1, 2), "float32"))


def affine(tensors):
    return {
        "y": tensors["x"] @ W + tensors["step"].astype(np.float32) * tensors["lora"],
        "same": tensors["x"],
    }


def refittable(tensors):
    return {"y": tensors["x"] @ tensors["w"] + tensors["b"]}


def marked(name):
    """The parameter of a backend; one that takes a GPU is skipped without."""
    marks = [pytest.mark.gpu] if engines.BACKENDS[name].nvidia else []
    return pytest.param(name, marks=marks)


def ready(backend, monkeypatch):
    """The name of a backend that can open both graphs."""
    about = engines.BACKENDS[backend]
    if about.vendor:
        vendor = pytest.importorskip(about.vendor)
        if about.options.get("provider", "") not in ("", *getattr(vendor, "get_available_providers", list)()):
            pytest.skip(f"this {about.vendor} is not the one for GPUs")
    else:
        functions = pytest.importorskip("hyperrt.engines.fake").FUNCTIONS
        monkeypatch.setitem(functions, "affine", affine)
        monkeypatch.setitem(functions, "refittable", refittable)
    return backend


def opened(backend, files=FILES, **options):
    """An engine of one of the graphs, compiled where the backend runs what was compiled."""
    path = GRAPHS / files[backend]
    if not engines.BACKENDS[backend].runs_plans or not path.exists():
        return engines.open(path, backend, **options)
    sizes = options.get("sizes") or {}
    weights = WEIGHTS if files is REFITTABLE else ()
    fixed = {"rows": 2, **sizes} if weights else sizes
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan"
        vendor = engines.BACKENDS[backend].vendor
        names = tuple(spec.name for spec in weights)
        tensorrt_build.build(
            tensorrt_build.BuildRequest(str(path), str(plan), vendor, "current", fixed, RANGES, names)
        )
        return engines.open(path, backend, plan=plan, weights=weights, **options)
