"""Engines in a process that was forked, which has none of the threads that compute: waiting for one hangs.

So an engine from before the fork is refused with an error that says "spawn".  It is not freed either, since
vendors wait for their threads when they free a graph.  A forked process can open graphs of its own with ONNX
Runtime, and with OpenVINO unless that was used before the fork.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import TypeVar

from hyperrt.engines.errors import EngineForked

Held = TypeVar("Held")

_OPEN: weakref.WeakSet[object] = weakref.WeakSet()
_HELD: list[object] = []  # of vendors, for as long as the process lives


def watch(engine: object) -> int:
    """Note an engine that is being opened; returns the process that it belongs to, for `check`."""
    _OPEN.add(engine)
    return os.getpid()


def hold(vendors: Held) -> Held:
    """Keep something of a vendor's until the process ends, in a forked one without freeing it then."""
    _HELD.append(vendors)
    return vendors


def check(process: int) -> None:
    """Refuse what was opened in another process.

    Args:
        process: what `watch` returned, or `os.getpid()`, when it was opened.

    Raises:
        EngineForked: this process was forked since.
    """
    if process != (here := os.getpid()):
        why = f"it was opened in process {process}; this is {here}, and a fork copies no threads"
        do = "start processes by spawn, multiprocessing.get_context('spawn'), and open it in each of them"
        raise EngineForked("the engine cannot be used in a forked process", why, do)


class Lock:
    """A re-entrant lock that a forked process does not wait for if a thread held it that stayed behind.

    `with` raises EngineForked there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            if not self._lock.acquire(blocking=False):
                check(self._process)
            self._lock.release()
            self._process = os.getpid()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _keep() -> None:
    """Hold what the engines hold until the process ends, whatever else is freed."""
    for kept in (*map(vars, _OPEN), *_HELD):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_keep)
