"""Engines: open one graph on one backend and run it.

    from hyperrt import engines
    with engines.open("unet.onnx", backend="onnxruntime", threads=2) as engine:
        outputs = engine.run({"x": x})

The names below are imported on first use, so that importing the errors does not load NumPy.  A vendor's
package is imported when its backend is opened.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hyperrt.engines import telemetry

if TYPE_CHECKING:
    from hyperrt.engines.backends import BACKENDS, load, resolve
    from hyperrt.engines.base import Engine, open
    from hyperrt.engines.errors import (
        BackendMissing,
        EngineClosed,
        EngineError,
        EngineForked,
        EngineInputError,
        EngineLoadError,
        EngineMemoryError,
        EngineUnusable,
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

_DEFINED_IN = {
    "BACKENDS": "backends",
    "Engine": "base",
    "TensorSpec": "tensors",
    "load": "backends",
    "open": "base",
    "resolve": "backends",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hyperrt.engines' has no attribute {name!r}")
    module = importlib.import_module(f"hyperrt.engines.{_DEFINED_IN.get(name, 'errors')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
