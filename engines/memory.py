"""What memory this process uses, as Linux tells it; 0 on other systems."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The most so far.

    Not `getrusage`: what that says begins with the memory of whoever started the process.
    """
    return _field("VmHWM:")


def resident_bytes() -> int:
    """Now."""
    return _field("VmRSS:")


def give_back() -> None:
    """Return to the system what was freed.

    glibc keeps it for this process: half of a graph's weights, where ONNX Runtime holds them in pieces below
    32 MB. Elsewhere this does nothing.
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
