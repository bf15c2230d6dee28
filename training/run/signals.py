"""SIGTERM and SIGINT: a training saves its state before it ends."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("hyperrt.training")


@contextlib.contextmanager
def stopping(launched: bool = False) -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT: the first asks the loop to stop, a second one ends the process.

    Args:
        launched: by a launcher. It may repeat a signal that the process has already received, so then only
            SIGKILL ends the process.

    Raises:
        SystemExit: 128 + the signal's number, at the end of the context, if a signal arrived.
    """
    received: list[int] = []
    handlers: dict[int, Any] = {}

    def receive(number: int, _: object) -> None:
        received.append(number)
        if not launched:
            signal.signal(number, handlers[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        log.warning("stopped by signal %d; the state is saved", received[0])
        raise SystemExit(128 + received[0])
