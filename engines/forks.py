"""Refuses engines in a forked process: a fork copies no threads, so a run would wait for one forever.

The error advises to spawn processes instead.  The engine is not freed there either, because vendors wait for
their threads when they free a graph.  A forked process can open new graphs with ONNX Runtime, and with
OpenVINO unless that was used before the fork.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TypeVar

from hyperrt.engines.errors import EngineForked

T = TypeVar("T")

_OPEN: weakref.WeakSet[object] = weakref.WeakSet()
_KEPT: list[object] = []  # until the process ends


def watch(engine: object) -> int:
    """Register an engine; returns the id of its process, for `check`."""
    _load_ctypes()
    _OPEN.add(engine)
    return os.getpid()


def keep(thing: T) -> T:
    """Keep an object of a vendor's until the process ends; a forked process does not free it even then."""
    _load_ctypes()
    _KEPT.append(thing)
    return thing


def check(process: int) -> None:
    """Refuse what was opened in another process.

    Args:
        process: id of the process that opened it: what `watch` returned, or `os.getpid()`.

    Raises:
        EngineForked: this process was forked from that one.
    """
    if process != (this := os.getpid()):
        why = f"it was opened in process {process}; this is {this}, and a fork copies no threads"
        do = "start processes by spawn, multiprocessing.get_context('spawn'), and open it in each of them"
        raise EngineForked("the engine cannot be used in a forked process", why, do)


class Lock:
    """A re-entrant lock that is safe to use after a fork.

    If another thread held it during the fork, nobody releases it in the forked process: there `with` raises
    EngineForked instead of waiting.
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


def _never_free() -> None:
    """In a forked process: add a reference to what engines hold, so that it is never freed."""
    for thing in (*map(vars, _OPEN), *_KEPT):
        import ctypes  # loaded before the fork

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _load_ctypes() -> None:
    """Import ctypes before a fork needs it; `hyperrt --help` does without these milliseconds."""
    import ctypes  # noqa: F401


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_never_free)
