"""Prints results, progress, warnings and errors of a command.

stdout carries results only: lines of text, or with `--json` one JSON event a line; the last is `result` or
`error`. stderr carries progress, warnings and errors. Text that may come from a file is escaped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import click

from hyperrt.text import printable

SCHEMA = 1
Command = TypeVar("Command", bound=Callable[..., Any])


class Output:
    """Where a command's results, progress, warnings and errors go.

    Attributes:
        json: whether events are printed instead of text.
    """

    def __init__(self, json: bool, stopped: Callable[[], bool]) -> None:
        self.json = json
        self._stopped = stopped
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by the caller: "hyperrt ... >&-"
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end
            if hasattr(getattr(sys, name), "reconfigure"):
                getattr(sys, name).reconfigure(errors="backslashreplace")
        self._logger = logging.getLogger("hyperrt")
        self._before = self._logger.handlers, self._logger.propagate
        self._logger.handlers, self._logger.propagate = [_ToOutput(self)], False
        logging.getLogger("PIL").addHandler(logging.NullHandler())  # photos/load.py reports bad photos

    def event(self, name: str, /, **fields: Any) -> None:
        """One line of JSON on stdout; nothing without `--json`."""
        if self.json:
            line = {"event": name, **({"schema": SCHEMA} if name in ("result", "error") else {}), **fields}
            print(json.dumps(line, default=str), flush=True)

    def result(self, text: str, /, **fields: Any) -> None:
        """The command's result: `text` on stdout, or the event."""
        if not self.json and text:
            print(printable(text, lines=True))
        self.event("result", **fields)

    def note(self, text: str, /, **fields: Any) -> None:
        """Print a line on stderr, or an event `note`."""
        if self.json:
            self.event("note", message=text, **fields)
        else:
            print(printable(text, lines=True), file=sys.stderr)

    def warning(self, text: str) -> None:
        """Print a warning on stderr, or the event."""
        if self.json:
            self.event("warning", message=text)
        else:
            print(f"warning: {printable(text, lines=True)}", file=sys.stderr)

    def error(self, error: Any) -> None:
        """Print an error as three lines on stderr, or the event; `error` has what, why, do and code."""
        if self.json:
            fields = {"code": error.code, "type": type(error).__name__.lstrip("_")}
            self.event("error", **fields, what=error.what, why=error.why, do=error.do)
            return
        lines = [("error: ", error.what), ("  why: ", error.why), ("  do:  ", error.do)]
        for head, text in lines:
            if text:
                # Spaces are kept: a name in a command may have two of them.
                print(head + printable(" ".join(line.strip() for line in text.splitlines())), file=sys.stderr)

    def bytes(self) -> BinaryIO:
        """stdout as a binary file."""
        return sys.stdout.buffer

    def flush(self) -> None:
        """Flush stdout, so that a full disk or a closed pipe is an error of the command."""
        sys.stdout.flush()

    def release(self) -> None:
        """Restore the library's log handlers, for a program that runs a command and continues."""
        self._logger.handlers, self._logger.propagate = self._before

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show progress: a bar on a terminal, else a line per 10 %, or events; yields `advance_to(done)`."""
        with _bar(label, total) if self._draws_bars() else self._lines(label, total) as show:

            def advance_to(done: int) -> None:
                # Python cannot raise in a finaliser or a callback from C: look for a signal here too.
                if self._stopped():
                    raise KeyboardInterrupt
                show(done)

            yield advance_to

    def _draws_bars(self) -> bool:
        return not self.json and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @contextlib.contextmanager
    def _lines(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        tenths = 0

        def show(done: int) -> None:
            nonlocal tenths
            if self.json:
                self.event("progress", stage=label, done=done, total=total)
            elif done * 10 // total > tenths:
                tenths = done * 10 // total
                print(f"{label}: {tenths * 10} % ({done} of {total})", file=sys.stderr, flush=True)

        yield show


def _use_json(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value and isinstance(context.obj, Output):
        context.obj.json = True


def with_json(command: Command) -> Command:
    """The option `--json`."""
    text = "Print one JSON event a line; the last is the result or the error."
    return click.option(
        "--json", is_flag=True, expose_value=False, is_eager=True, callback=_use_json, help=text
    )(command)


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)


class _ToOutput(logging.Handler):
    """Prints each warning of the library once, and the log of a training as notes."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self._warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            self._output.note(text)
        elif text not in self._warned:  # the library may log it once per batch
            self._warned.add(text)
            self._output.warning(text)
