"""The errors that engines raise: each says what happened, why and what to do, and has an exit code.

They stand apart from those of `hyperrt.errors`, because this package knows nothing of that one.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """A backend or its device failed; base of every error of this package.

    Args:
        what: what happened, one line.
        why: the cause, as far as it is known; may be empty.
        do: the next step for the reader; may be empty.
    """

    code: ClassVar[int] = 7

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


class EngineInputError(EngineError):
    """A tensor or option that the caller passed is not one that is taken; nothing was run or changed."""

    code: ClassVar[int] = 1


class EngineClosed(EngineError):
    """The engine was used after `close`."""

    code: ClassVar[int] = 1


class BackendMissing(EngineError):
    """No such backend, or the package that it needs is not installed."""

    code: ClassVar[int] = 4


class EngineLoadError(EngineError):
    """The graph cannot be opened on this backend: not there, not a graph, or an operator is not supported."""

    code: ClassVar[int] = 5


class EngineMemoryError(EngineError):
    """Memory ran out while opening or running; the engine, where it is open, can still be used."""

    code: ClassVar[int] = 6


class EngineForked(EngineError):
    """This process was forked after the engine was opened: the threads that compute are not in it."""


class EngineUnusable(EngineError):
    """A refit failed half way, and the old constants could not be written back; the next refit writes all."""
