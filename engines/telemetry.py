"""Packages of vendors that report how they are used: switched off here, before any of them is imported.

What each does when nobody stops it (seen with strace; docs/log.md has the calls):

    onnxruntime      writes an id of the device and a database to ~/.cache/Microsoft; a process that lives for
                     15 seconds looks up a host of Microsoft.  ORT_DISABLE_TELEMETRY=1 stops both, if it is
                     set before the import.
    openvino         imports openvino_telemetry, which writes an id and a counter to ~/intel, and looks up a
                     host of Google.  OPENVINO_TELEMETRY_DISABLE stops neither.  Where that package cannot be
                     imported, OpenVINO works without it.
    huggingface_hub  names the libraries in each download.  HF_HUB_DISABLE_TELEMETRY=1 stops that.

A program that imports one of them itself, before HyperRT opens an engine, has started its telemetry already.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

from hyperrt.engines import forks

VARIABLES: Mapping[str, str] = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
OPENVINO = "openvino_telemetry"


def switch_off() -> None:
    """Set the variables that ONNX Runtime and Hugging Face's hub read when they are imported."""
    os.environ.update(VARIABLES)


# Two imports at once would undo each other's hiding; and a forked process must not wait for a half-done one.
IMPORTING = forks.Lock()


def import_vendor(name: str) -> ModuleType:
    """The module of a vendor, imported without its telemetry.

    Raises:
        ImportError, OSError: as the import does.
        EngineForked: this process was forked while a thread imported one.
    """
    with IMPORTING, _hidden(OPENVINO):
        return importlib.import_module(name)


def left_on() -> list[str]:
    """The telemetry that another part of this process has on: a variable that was changed, or a module."""
    now = {name: os.environ.get(name) for name in VARIABLES}
    found = [f"{name}={text}" for name, text in now.items() if text != VARIABLES[name]]
    return found + ([OPENVINO] if OPENVINO in sys.modules else [])


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Make `import package` fail for a while; what was imported of it is there again afterwards."""
    inside = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    before = {name: sys.modules.pop(name) for name in inside}
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        sys.modules.pop(package, None)
        sys.modules.update(before)
