"""The base of every error of this project, and the errors of engines.

    HyperRTError 1
    ├── EngineError 7             a backend or its device failed
    │   ├── EngineInputError 1    a tensor or an option is not accepted
    │   ├── EngineClosed 1        used after `close`
    │   ├── BackendMissing 4      unknown, or its package is not installed
    │   ├── EngineLoadError 5     the graph cannot be opened
    │   ├── EngineMemoryError 6   memory ran out
    │   ├── EngineForked 7        opened before this process was forked
    │   └── EngineUnusable 7      a refit failed half way
    └── the errors of the runtime: hyperrt/errors.py

The number is `code`, the exit status of the command line.  The base is here because this package imports
nothing from the layers above it; everybody else imports it from `hyperrt.errors`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class HyperRTError(Exception):
    """Base of every error that is raised on purpose; `str` gives up to three lines.

    Args:
        what: what happened, one line.
        why: the cause; may be empty.
        do: what to do about it; may be empty.
    """

    code: ClassVar[int] = 1

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        # All three go to Exception.args, so that pickling (worker processes) rebuilds the same error.
        super().__init__(what, why, do)
        self.what = what
        self.why = why
        self.do = do

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.do:
            lines.append(f"  do:  {self.do}")
        return "\n".join(lines)


class EngineError(HyperRTError):
    """A backend or its device failed; base of the errors of engines."""

    code: ClassVar[int] = 7


class EngineInputError(EngineError):
    """A tensor or option that the caller passed is not accepted; nothing was run or changed."""

    code: ClassVar[int] = 1


class EngineClosed(EngineError):
    """The engine was used after `close`."""

    code: ClassVar[int] = 1


class BackendMissing(EngineError):
    """No such backend, or the package that it needs is not installed."""

    code: ClassVar[int] = 4


class EngineLoadError(EngineError):
    """The graph cannot be opened: no such file, not a graph, or the backend lacks one of its operators."""

    code: ClassVar[int] = 5


class EngineMemoryError(EngineError):
    """Memory ran out while opening or running; an engine that was open can still be used."""

    code: ClassVar[int] = 6


class EngineForked(EngineError):
    """This process was forked after the engine was opened, and does not have its compute threads."""


class EngineUnusable(EngineError):
    """A refit failed half way, and writing the old constants back failed too; the next refit writes all."""


def listed(names: Iterable[str]) -> str:
    """Names for a message, sorted."""
    return ", ".join(sorted(names)) or "none"


def nearest(name: str, names: Iterable[str]) -> str:
    """A question for a message: "did you mean 'latents'?"; "" if no name is similar."""
    import difflib  # not needed by commands that succeed

    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {matches[0]!r}?" if matches else ""
