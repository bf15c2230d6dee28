"""Turns any exception that ends a command into an error with what, why, do and an exit code."""

from __future__ import annotations

import errno
import sys
from typing import Any

from hyperrt.errors import HyperRTError, ResourceError, UsageError

_FULL = {errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.ENFILE, getattr(errno, "EDQUOT", errno.ENOSPC)}


class Interrupted(HyperRTError):
    """A signal ended the command; `code` is 128 + its number."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what)
        self.code = code  # type: ignore[misc]


class Bug(HyperRTError):
    """An exception that HyperRT does not raise on purpose."""

    code = 1


def explained(error: BaseException) -> Any:
    """The error that the command prints for an exception: it has `what`, `why`, `do` and `code`."""
    for candidate in (error, error.__cause__):  # the training commands wrap theirs for click
        if isinstance(candidate, HyperRTError):
            return candidate
    if isinstance(error, MemoryError):
        return ResourceError(
            "memory ran out", str(error), "close other programs, or use a smaller --batch-size"
        )
    if isinstance(error, OSError) and error.errno in _FULL:
        name = f"{error.filename}: " if error.filename else ""
        what = f"{name}{error.strerror}"
        return ResourceError(what, "the system has none left", "make room, then try again")
    if isinstance(error, OSError) and error.filename:
        what = f"{str(error.filename)[-200:]}: {error.strerror}"
        return UsageError(what, "the system refuses access", "check the name, or choose another")
    if isinstance(error, FileNotFoundError):  # without a name: os.getcwd
        do = "change to another folder, then try again"
        return UsageError("the current folder does not exist any more", "it was removed", do)
    click = sys.modules.get("click")
    if click is not None and isinstance(error, click.ClickException):
        from hyperrt.cli.origin import explain_click

        return UsageError(*explain_click(error))
    return Bug(
        f"something went wrong inside HyperRT: {type(error).__name__}: {error}",
        "this is a bug, not your mistake",
        "please report it, with the command and what it prints when HYPERRT_DEBUG=1 is set",
    )
