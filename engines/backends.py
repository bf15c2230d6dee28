"""The table of backends: which module runs a graph, what it needs and what it can do.

No other file of the code lists backends or compares their names: it asks for a field of `Backend`.  Importing
this module loads neither NumPy nor a vendor's package.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hyperrt.engines import cpu, telemetry
from hyperrt.engines.errors import BackendMissing, EngineError, listed, nearest

CUDA_PROVIDER = "capi/*onnxruntime_providers_cuda.*"  # in the package onnxruntime of onnxruntime-gpu


@dataclass(frozen=True)
class Backend:
    """One way to run a graph.

    Attributes:
        title: the vendor's spelling, for messages.
        module: module of this package; its `open(path, **options)` opens a graph.
        vendor: module that the vendor's package installs; "" if none is needed.
        packages: distributions that install `vendor`; only one of them may be installed.
        install: command that installs one.
        options: arguments of `open` that the entry fixes, so that backends can share a module.
        for_tests: whether it is left out of lists for users.
        nvidia: whether it needs an NVIDIA GPU.
        on_device: whether feeds and results may stay on the device, as `DeviceArray`.
        fixed_sizes: whether it is faster with an engine per set of sizes, which `open` takes as `sizes`.
        caches: whether it keeps compiled graphs in a folder, which `open` takes as `cache`.
        runs_plans: whether it runs compiled plans, which `open` takes as `plan`, instead of graphs.
        cross_compiles: whether a plan can be compiled for a GPU that this machine does not have.
        refits: whether `Engine.refit` can replace constants.
        precisions: what `open` takes as `precision`; empty where the graph alone decides.
        loads_fp32: whether loading a graph takes memory for a second copy of its weights, in fp32.
        graph_options: name of a bundle's graph -> options of `open` that it is always opened with.
    """

    title: str
    module: str
    vendor: str = ""
    packages: tuple[str, ...] = ()
    install: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    for_tests: bool = False
    nvidia: bool = False
    on_device: bool = False
    fixed_sizes: bool = False
    caches: bool = False
    runs_plans: bool = False
    cross_compiles: bool = False
    refits: bool = False
    precisions: tuple[str, ...] = ()
    loads_fp32: bool = False
    graph_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


BACKENDS = {
    "fake": Backend("the fake backend", "fake", for_tests=True, refits=True),
    "onnxruntime": Backend(
        "ONNX Runtime", "onnxruntime", "onnxruntime",
        packages=("onnxruntime", "onnxruntime-gpu"),
        install="pip install 'hyperrt[cpu]'",
        refits=True,
    ),
    "onnxruntime-cuda": Backend(
        "ONNX Runtime with CUDA", "onnxruntime", "onnxruntime",
        packages=("onnxruntime", "onnxruntime-gpu"),
        install="pip install 'hyperrt[cuda]'",
        options={"provider": "CUDAExecutionProvider"},
        nvidia=True,
        fixed_sizes=True,
        refits=True,
    ),
    "onnxruntime-tensorrt": Backend(
        "ONNX Runtime with TensorRT", "onnxruntime", "onnxruntime",
        packages=("onnxruntime", "onnxruntime-gpu"),
        install="pip install 'hyperrt[cuda]' 'tensorrt<11'",  # its wheels are linked with TensorRT 10
        options={"provider": "TensorrtExecutionProvider"},
        nvidia=True,
        fixed_sizes=True,
    ),
    "openvino": Backend(
        "OpenVINO", "openvino", "openvino",
        packages=("openvino",),
        install="pip install 'hyperrt[openvino]'",
        fixed_sizes=True,
        caches=True,
        precisions=("auto", "f32", "bf16"),
        loads_fp32=True,
        graph_options={"vae_decoder": {"precision": "f32"}},  # rounded to bf16, pictures show bands
    ),
    "tensorrt": Backend(
        "TensorRT", "nvidia.tensorrt", "tensorrt",
        packages=("tensorrt",),
        install="pip install 'hyperrt[tensorrt]'",
        options={"vendor": "tensorrt"},
        nvidia=True,
        on_device=True,
        runs_plans=True,
        refits=True,
    ),
    "tensorrt-rtx": Backend(
        "TensorRT-RTX", "nvidia.tensorrt", "tensorrt_rtx",
        packages=("tensorrt_rtx",),
        install="pip install 'hyperrt[tensorrt-rtx]'",
        options={"vendor": "tensorrt_rtx"},
        nvidia=True,
        on_device=True,
        runs_plans=True,
        cross_compiles=True,
        refits=True,
    ),
}  # fmt: skip

DEFAULT = "onnxruntime"  # runs on every processor, and refits


def names(capability: str) -> list[str]:
    """Backends for users that have a capability, a field of `Backend`."""
    return [
        name
        for name, backend in BACKENDS.items()
        if getattr(backend, capability) and not backend.for_tests
    ]


def resolve(backend: str) -> str:
    """The name of a backend in `BACKENDS`; for "auto" the fastest that is installed.

    That is onnxruntime-cuda if its package is installed and there is an NVIDIA GPU; else openvino on
    processors of Intel and on those that multiply bfloat16, and onnxruntime on others.

    Raises:
        BackendMissing: there is no such backend.
    """
    if backend == "auto":
        if _suits_cuda():
            return "onnxruntime-cuda"
        has_openvino, has_onnxruntime = (find_spec(name) is not None for name in ("openvino", "onnxruntime"))
        if has_openvino and (cpu.suits_openvino() or not has_onnxruntime):
            return "openvino"
        return DEFAULT
    if backend not in BACKENDS:
        choices = [name for name in BACKENDS if not BACKENDS[name].for_tests]
        what, why = f"no backend is called {backend[:60]!r}", f"there are: {listed(choices)}, auto"
        raise BackendMissing(what, why, nearest(backend, [*choices, "auto"]))
    return backend


def _suits_cuda() -> bool:
    """Whether ONNX Runtime's package for GPUs is installed, with a driver and a GPU for it.

    The module of the package for processors is not loaded to find out.
    """
    spec = find_spec("onnxruntime")
    folders = (spec and spec.submodule_search_locations) or ()
    if not any(file for folder in folders for file in Path(folder).glob(CUDA_PROVIDER)):
        return False
    try:
        load("onnxruntime-cuda").check(**BACKENDS["onnxruntime-cuda"].options)
    except EngineError:
        return False
    return True


def load(name: str) -> Any:
    """The module of a backend, its vendor's package imported.

    Args:
        name: one of `BACKENDS`.

    Raises:
        BackendMissing: the package is not installed.
        EngineError: it is installed but does not start, for example because a library is missing.
    """
    backend = BACKENDS[name]
    try:
        with telemetry.IMPORTING:
            if backend.vendor:
                _check_package(telemetry.import_vendor(backend.vendor), backend.install)
            return importlib.import_module(f"hyperrt.engines.{backend.module}")
    except (ImportError, OSError) as error:  # OSError: packages that load their libraries themselves
        if isinstance(error, ModuleNotFoundError) and error.name == backend.vendor:
            raise BackendMissing(
                f"the backend {name!r} is not installed",
                f"there is no package {backend.vendor!r}",
                f"run: {backend.install}",
            ) from error
        raise EngineError(
            f"the backend {name!r} is installed but does not start",
            str(error),
            f"install it again: {backend.install}",
        ) from error


def _check_package(module: ModuleType, install: str) -> None:
    """Refuse a file of the user's that has the name of a vendor's package."""
    file = getattr(module, "__file__", None)
    if file and not hasattr(module, "__path__"):
        what, why = f"{module.__name__} is not the package of that name", f"Python found {file} first"
        raise EngineError(what, why, f"rename that file; the package comes with: {install}")
