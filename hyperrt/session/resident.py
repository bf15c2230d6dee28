"""An open engine and what it holds, so that nothing is uploaded twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hyperrt.engines.base import Engine
from hyperrt.engines.errors import EngineUnusable

_versions = itertools.count(1)


class Resident:
    """An open engine, and the inputs and constants that it keeps from call to call.

    Attributes:
        engine: the open graph.
        version: another number after every change of what the engine holds. Versions of two engines differ,
            so a caller that remembers one can tell whether the engine still holds what it put there.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.version = next(_versions)
        self._held: dict[str, object] = {}

    def holds(self, name: str, value: object) -> bool:
        """Whether the engine holds this value, by equality, under this name."""
        return name in self._held and self._held[name] == value

    def value(self, name: str) -> object:
        """The value that the engine holds under this name; None: unknown."""
        return self._held.get(name)

    def hold(self, name: str, value: object, load: Callable[[], None]) -> None:
        """Let `load` put a value into the engine, unless the engine holds it. An error keeps the old value.

        Args:
            name: of what the engine holds, such as "lora_q".
            value: identifies the value; compared by equality.
            load: binds or refits it.

        Raises:
            engines.EngineError: as `load`; after `EngineUnusable` the old value is lost, too.
        """
        if self.holds(name, value):
            return
        try:
            load()
        except EngineUnusable:
            self.forget(name)
            raise
        self._held[name] = value
        self.version = next(_versions)

    def forget(self, name: str) -> None:
        """Treat what the engine holds under this name as unknown."""
        self._held.pop(name, None)
        self.version = next(_versions)
