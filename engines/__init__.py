"""Engines: open one graph on one backend and run it.

    with engines.open("unet.onnx", backend="onnxruntime", threads=2) as engine:
        outputs = engine.run({"x": x})

Importing this package loads NumPy and nothing of any vendor: a vendor's package is imported when its backend
is opened.  Contract: `engines.base`; feed checks: `engines.tensors`.  Errors: `engines.errors`.
"""

from engines.backends import BACKENDS
from engines.base import (
    BackendMissing,
    Engine,
    EngineClosed,
    EngineError,
    EngineInputError,
    EngineLoadError,
    EngineMemoryError,
    EngineUnusable,
    load,
    open,
    resolve,
)
from engines.tensors import TensorSpec

__all__ = [
    "BACKENDS",
    "BackendMissing",
    "Engine",
    "EngineClosed",
    "EngineError",
    "EngineInputError",
    "EngineLoadError",
    "EngineMemoryError",
    "EngineUnusable",
    "TensorSpec",
    "load",
    "open",
    "resolve",
]
