"""Packages of vendors that report how they are used: switched off here, before any of them is imported.

What each does when nobody stops it (seen with strace; docs/log.md has the calls):

    onnxruntime      writes an id of the device and a database to ~/.cache/Microsoft; a process that lives for
                     15 seconds looks up a host of Microsoft.  ORT_DISABLE_TELEMETRY=1 stops both, if it is
                     set before the import.
    openvino         imports openvino_telemetry, which writes an id and a counter to ~/intel, and looks up a
                     host of Google.  OPENVINO_TELEMETRY_DISABLE stops neither.  Where that package cannot be
                     imported, OpenVINO works without it.
    huggingface_hub  names the libraries in each download.  HF_HUB_DISABLE_TELEMETRY=1 stops that.

A program that imports one of them itself before HyperRT has started its telemetry already.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

VARIABLES: Mapping[str, str] = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
OPENVINO = "openvino_telemetry"


def switch_off() -> None:
    """Set the variables that ONNX Runtime and Hugging Face's hub read when they are imported."""
    os.environ.update(VARIABLES)


def import_vendor(name: str) -> ModuleType:
    """The module of a vendor, imported without its telemetry.

    Raises:
        ImportError, OSError: as the import does.
    """
    with _cannot_be_imported(OPENVINO):
        return importlib.import_module(name)


def left_on() -> list[str]:
    """The telemetry that another part of this process has on: a variable that was changed, or a module."""
    now = {name: os.environ.get(name) for name in VARIABLES}
    found = [f"{name}={text}" for name, text in now.items() if text != VARIABLES[name]]
    return found + ([OPENVINO] if OPENVINO in sys.modules else [])


@contextmanager
def _cannot_be_imported(name: str) -> Iterator[None]:
    """Make `import name` fail for a while; a module that is there already stays."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        sys.modules.pop(name, None)
