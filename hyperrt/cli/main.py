"""The `hyperrt` command: what becomes of a run's end, whatever end it is.

    0 ok   1 bug   2 usage   3 bad input   4 not found   5 incompatible   6 resources
    7 device   8 integrity   9 numeric   130 interrupted   141 the reader of stdout went away
    143 terminated

The commands are in `cli_commands`, what they print in `cli_output`. Both are imported inside `run`, so that
Ctrl-C during an import ends like Ctrl-C at any other time.  SIGTERM is taken like Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from hyperrt.errors import HyperRTError, ResourceError, UsageError

if TYPE_CHECKING:
    from hyperrt.cli.output import Output

STOPPED = 128  # + the signal's number, as the shell reports it for programs that a signal kills
BROKEN_PIPE = STOPPED + 13  # SIGPIPE
SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_FULL = {errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.ENFILE, getattr(errno, "EDQUOT", errno.ENOSPC)}

_signal = 0  # the one that came, if any


def main() -> int:
    """Entry point of the program: runs the command line and returns the exit code."""
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    try:
        code = run(sys.argv[1:])
    except BaseException:  # an interrupted import may raise anything
        if not _signal:
            raise
        code = STOPPED + _signal
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # all is written: no traceback from the interpreter's end
    return code


def run(arguments: Sequence[str]) -> int:
    """Run one command line, print its results and errors, and return its exit code.

    Args:
        arguments: without the program's name.
    """
    output = None
    try:
        from hyperrt.cli.output import Output

        output = Output(json="--json" in arguments, stopped=lambda: bool(_signal))
        from hyperrt.cli.commands import hyperrt

        if "_HYPERRT_COMPLETE" in os.environ:  # the shell asks what could come next
            hyperrt.main(list(arguments), prog_name="hyperrt")
        # Not click's `main`, which has its own idea of Ctrl-C, closed pipes and the end of input.
        with hyperrt.make_context("hyperrt", list(arguments), obj=output) as context:
            hyperrt.invoke(context)
        output.flush()
        if _signal:  # it came where Python cannot raise
            raise KeyboardInterrupt
        return 0
    except BaseException as error:
        return _end(error, output, "--debug" in arguments or bool(os.environ.get("HYPERRT_DEBUG")))
    finally:
        if output is not None:
            output.release()


def _end(error: BaseException, output: Output | None, debug: bool) -> int:
    """Say what happened, in three lines at most; returns the exit code."""
    if _signal or isinstance(error, KeyboardInterrupt):
        known: Any = _Interrupted(_signal or signal.SIGINT)
    elif isinstance(error, BrokenPipeError):
        _silence_stdout()
        return BROKEN_PIPE
    elif isinstance(error, SystemExit) or type(error).__name__ == "Exit":
        return int(getattr(error, "exit_code", getattr(error, "code", 1)) or 0)
    else:
        known = _explained(error)
    if debug and not isinstance(known, _Interrupted):
        import traceback

        traceback.print_exception(error)
    try:
        if output is not None:
            output.error(known)
            output.flush()
    except BrokenPipeError:
        _silence_stdout()
    except OSError:  # stdout is full: what can be said has gone to stderr
        _silence_stdout()
    return int(known.code)


class _Interrupted(HyperRTError):
    def __init__(self, number: int) -> None:
        super().__init__(SIGNALS[signal.Signals(number)])
        self.code = STOPPED + number  # type: ignore[misc]


class _Bug(HyperRTError):
    code = 1


def _explained(error: BaseException) -> Any:
    """The error as one with what, why, do and code."""
    for known in (error, error.__cause__):  # the training commands wrap theirs for click
        if isinstance(known, HyperRTError):
            return known
    if isinstance(error, MemoryError):
        return ResourceError(
            "memory ran out", str(error), "close other programs, or use a smaller --batch-size"
        )
    if isinstance(error, OSError) and error.errno in _FULL:
        name = f"{error.filename}: " if error.filename else ""
        return ResourceError(
            f"{name}{error.strerror}", "the system has no more of it", "make room, then try again"
        )
    if isinstance(error, OSError) and error.filename:
        what = f"{str(error.filename)[-200:]}: {error.strerror}"
        return UsageError(what, "the system refuses it", "check that name, or choose another")
    if isinstance(error, FileNotFoundError):  # without a name: os.getcwd
        do = "change to another folder, then try again"
        return UsageError("the current folder is not there any more", "it was removed", do)
    click = sys.modules.get("click")
    if click is not None and isinstance(error, click.ClickException):
        from hyperrt.cli.origin import explain_click

        return UsageError(*explain_click(error))
    return _Bug(
        f"something went wrong inside HyperRT: {type(error).__name__}: {error}",
        "this is a bug, not your mistake",
        "please report it, with the command and what it prints when HYPERRT_DEBUG=1 is set",
    )


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _signal
    if _signal:  # the second one: whoever presses it does not want to wait for the first
        os._exit(STOPPED + number)
    _signal = number
    sys.unraisablehook = lambda _: None  # in a finaliser or a callback the next line would print a traceback
    raise KeyboardInterrupt


def _silence_stdout() -> None:
    """Let the interpreter's last flush of stdout go nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
