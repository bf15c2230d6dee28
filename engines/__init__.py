"""Engines: open one graph on one backend and run it.

    from hyperrt import engines
    with engines.open("unet.onnx", backend="onnxruntime", threads=2) as engine:
        outputs = engine.run({"x": x})

Importing this package loads NumPy and nothing of any vendor: a vendor's package is imported when its backend
is opened.  Contract: engines/base.py; feed checks: engines/tensors.py; errors: engines/errors.py.
"""

from hyperrt.engines import telemetry
from hyperrt.engines.backends import BACKENDS
from hyperrt.engines.base import (
    BackendMissing,
    Engine,
    EngineClosed,
    EngineError,
    EngineForked,
    EngineInputError,
    EngineLoadError,
    EngineMemoryError,
    EngineUnusable,
    load,
    open,
    resolve,
)
from hyperrt.engines.tensors import TensorSpec

telemetry.switch_off()

__all__ = [
    "BACKENDS",
    "BackendMissing",
    "Engine",
    "EngineClosed",
    "EngineError",
    "EngineForked",
    "EngineInputError",
    "EngineLoadError",
    "EngineMemoryError",
    "EngineUnusable",
    "TensorSpec",
    "load",
    "open",
    "resolve",
]
