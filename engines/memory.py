"""The memory that this process uses, as Linux reports it; 0 on other systems."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The peak so far.

    Not from `getrusage`, whose peak starts with the memory of the parent process.
    """
    return _field("VmHWM:")


def resident_bytes() -> int:
    """The memory in use now."""
    return _field("VmRSS:")


def give_back() -> None:
    """Return freed memory to the system; does nothing without glibc.

    glibc keeps freed pieces below 32 MB: half of a graph's weights, if ONNX Runtime allocated such pieces.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
        if trim is not None:
            trim(0)


def _field(name: str) -> int:
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
