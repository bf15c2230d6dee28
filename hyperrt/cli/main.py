"""The `hyperrt` command: exit codes, signals and the error that ends a run.

    0 ok   1 bug   2 usage   3 bad input   4 not found   5 incompatible   6 resources
    7 device   8 integrity   9 numeric   130 interrupted   141 the reader of stdout went away
    143 terminated

SIGTERM is handled like Ctrl-C. This module imports next to nothing: `run` imports the rest, once `main` has
installed the signal handlers, so that Ctrl-C during an import ends like Ctrl-C at any other time.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # not from `typing`, which takes longer to import than all of the above
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from hyperrt.cli.output import Output

STOPPED = 128  # + the signal's number, as the shell reports it for programs that a signal kills
BROKEN_PIPE = STOPPED + 13  # SIGPIPE
SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

_signal = 0  # number of the signal that arrived, if any


class Stop(KeyboardInterrupt):
    """A signal arrived.

    A subclass, because CPython ends the whole process with SIGINT after a plain KeyboardInterrupt has once
    left an `exec`, such as that of a dataclass, even if it was caught.
    """


def main() -> int:
    """Run the command line of this process; returns the exit code."""
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    try:
        code = run(sys.argv[1:])
    except BaseException:  # an interrupted import may raise anything
        if not _signal:
            raise
        code = STOPPED + _signal
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # all output is written: no traceback while Python shuts down
    return code


def run(arguments: Sequence[str]) -> int:
    """Run one command, print its results and errors, and return its exit code.

    Args:
        arguments: without the program's name.
    """
    output = None
    try:
        from hyperrt.cli.output import Output

        output = Output(json="--json" in arguments, stopped=lambda: bool(_signal))
        from hyperrt.cli.commands import hyperrt

        if "_HYPERRT_COMPLETE" in os.environ:  # the shell asks for completions
            hyperrt.main(list(arguments), prog_name="hyperrt")
        # Not click's `main`, which handles Ctrl-C, closed pipes and the end of input in another way.
        with hyperrt.make_context("hyperrt", list(arguments), obj=output) as context:
            hyperrt.invoke(context)
        output.flush()
        if _signal:  # it arrived where Python cannot raise
            raise Stop
        return 0
    except BaseException as error:
        return _end(error, output, "--debug" in arguments or bool(os.environ.get("HYPERRT_DEBUG")))
    finally:
        if output is not None:
            output.release()


def _end(error: BaseException, output: Output | None, debug: bool) -> int:
    """Print the error that ended a run, in three lines at most; returns the exit code."""
    from hyperrt.cli.failures import Interrupted, explained

    stopped = _signal or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
    if stopped:
        failure = Interrupted(SIGNALS[signal.Signals(stopped)], STOPPED + stopped)
    elif isinstance(error, BrokenPipeError):
        _silence_stdout()
        return BROKEN_PIPE
    elif isinstance(error, SystemExit) or type(error).__name__ == "Exit":
        return int(getattr(error, "exit_code", getattr(error, "code", 1)) or 0)
    else:
        failure = explained(error)
    if debug and not stopped:
        import traceback

        traceback.print_exception(error)
    try:
        if output is not None:
            output.error(failure)
            output.flush()
    except BrokenPipeError:
        _silence_stdout()
    except OSError:  # stdout is full; the error went to stderr
        _silence_stdout()
    return int(failure.code)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _signal
    if _signal:  # the second signal: end at once, without waiting for the first
        os._exit(STOPPED + number)
    _signal = number
    sys.unraisablehook = lambda _: None  # in a finaliser or a callback the next line would print a traceback
    raise Stop


def _silence_stdout() -> None:
    """Redirect stdout to the null device, so that Python's last flush does not fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
