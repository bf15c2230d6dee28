"""Warnings and errors of the training commands."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import click

from hyperrt.engines.errors import EngineError
from hyperrt.errors import HyperRTError

log = logging.getLogger("hyperrt.training")


def warn(what: str, why: str, do: str) -> None:
    """Logs a warning in the three lines of an error."""
    log.warning("%s\n  why: %s\n  do:  %s", what, why, do)


def first_line(error: Exception) -> str:
    """The first line of another library's error, for the "why" of an error of ours."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Runs a command: logs progress to stderr, and turns expected errors into a message and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        yield
    except (HyperRTError, EngineError, FileNotFoundError) as error:
        failure = click.ClickException(str(error))
        failure.exit_code = getattr(error, "code", 4)  # 4: not found
        raise failure from error
