"""HyperRT: personalised text-to-image from a few photos, with no PyTorch at run time.

    import hyperrt
    with hyperrt.Runtime.open("tiny") as runtime:
        subject = runtime.personalize("photos/")
        result = runtime.generate("a [V] robot on a beach", subject, n=4)   # uint8 [4, H, W, 3]

The names below are imported on first use, so that `hyperrt --help` need not wait for NumPy.
"""

from __future__ import annotations

import os.path

from hyperrt.version import VERSION

TYPE_CHECKING = False  # not from `typing`: until the command handles Ctrl-C, every import counts
if TYPE_CHECKING:
    from typing import Any

    from hyperrt.bundle.bundle import Bundle
    from hyperrt.errors import HyperRTError
    from hyperrt.lora.subject import Subject
    from hyperrt.runtime import Result, Runtime
    from hyperrt.sampling import recipe
    from hyperrt.sampling.loop import Step

__version__ = VERSION

__all__ = [
    "Bundle",
    "HyperRTError",
    "Result",
    "Runtime",
    "Step",
    "Subject",
    "__version__",
    "recipe",
]

_FOLDER = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_FOLDER, "engines")):
    # In the repository `hyperrt.engines`, `.training` and `.export` lie beside this folder, not in it.
    __path__.append(os.path.dirname(_FOLDER))

_DEFINED_IN = {
    "Bundle": "bundle.bundle",
    "HyperRTError": "errors",
    "Result": "runtime",
    "Runtime": "runtime",
    "Step": "sampling.loop",
    "Subject": "lora.subject",
    "recipe": "sampling.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'hyperrt' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"hyperrt.{_DEFINED_IN[name]}")
    value = getattr(module, name, module)  # `recipe` is a module itself
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_DEFINED_IN})
