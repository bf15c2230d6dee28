"""The table of backends: which module of this package runs a graph, and what it needs to be installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Backend:
    """One way to run a graph.

    Attributes:
        module: of this package; its `open(path, **options)` makes the engines.
        vendor: the module that its vendor's package installs; "": none needed.
        install: the line that installs it.
        nvidia: whether it takes an NVIDIA GPU to run.
        loads_fp32: while a graph is loaded its weights are in memory once more, in fp32.
        options: of `open`, fixed: they make several backends of one module.
    """

    module: str
    vendor: str = ""
    install: str = ""
    nvidia: bool = False
    loads_fp32: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


BACKENDS = {
    "fake": Backend("fake"),
    "onnxruntime": Backend("onnxruntime", "onnxruntime", "pip install 'hyperrt[cpu]'"),
    "onnxruntime-cuda": Backend(
        "onnxruntime", "onnxruntime", "pip install 'hyperrt[cuda]'", nvidia=True,
        options={"provider": "CUDAExecutionProvider"},
    ),
    "onnxruntime-tensorrt": Backend(  # the wheels of ONNX Runtime are linked with TensorRT 10
        "onnxruntime", "onnxruntime", "pip install 'hyperrt[cuda]' 'tensorrt<11'", nvidia=True,
        options={"provider": "TensorrtExecutionProvider"},
    ),
    "openvino": Backend("openvino", "openvino", "pip install 'hyperrt[openvino]'", loads_fp32=True),
    "tensorrt": Backend(
        "nvidia.tensorrt", "tensorrt", "pip install 'hyperrt[tensorrt]'", nvidia=True,
        options={"vendor": "tensorrt"},
    ),
    "tensorrt-rtx": Backend(
        "nvidia.tensorrt", "tensorrt_rtx", "pip install 'hyperrt[tensorrt-rtx]'", nvidia=True,
        options={"vendor": "tensorrt_rtx"},
    ),
}  # fmt: skip
