"""Switches off the telemetry of vendors' packages before any of them is imported.

What each does by default (observed with strace; docs/log.md has the calls):

    onnxruntime      writes a device id and a database to ~/.cache/Microsoft; after 15 seconds it looks up a
                     host of Microsoft.  ORT_DISABLE_TELEMETRY=1 stops both, if it is set before the import.
    openvino         imports openvino_telemetry, which writes an id and a counter to ~/intel and looks up a
                     host of Google.  OPENVINO_TELEMETRY_DISABLE stops neither.  OpenVINO works without it.
    huggingface_hub  sends the names of libraries with each download.  HF_HUB_DISABLE_TELEMETRY=1 stops that.

A program that imports one of them before HyperRT opens an engine has already started its telemetry.
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
    """Set the environment variables that ONNX Runtime and huggingface_hub read when they are imported."""
    os.environ.update(VARIABLES)


# Two imports at once would undo each other's hiding; a forked process must not wait for an unfinished one.
IMPORTING = forks.Lock()


def import_vendor(name: str) -> ModuleType:
    """Import a vendor's module without its telemetry.

    Raises:
        ImportError, OSError: the import failed.
        EngineForked: this process was forked while another thread imported a vendor's module.
    """
    with IMPORTING, _hidden(OPENVINO):
        return importlib.import_module(name)


def left_on() -> list[str]:
    """Telemetry that another part of this process switched on: changed variables and imported modules."""
    values = {name: os.environ.get(name) for name in VARIABLES}
    changed = [f"{name}={value}" for name, value in values.items() if value != VARIABLES[name]]
    return changed + ([OPENVINO] if OPENVINO in sys.modules else [])


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Make `import package` fail inside the block; modules imported before are restored after it."""
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    before = {name: sys.modules.pop(name) for name in names}
    sys.modules[package] = None  # type: ignore[assignment]  # makes Python raise ImportError
    try:
        yield
    finally:
        sys.modules.pop(package, None)
        sys.modules.update(before)
