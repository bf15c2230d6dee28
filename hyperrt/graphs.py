"""The graphs of a bundle on a backend: each is opened when it is first needed, and closed when it is told.

A backend that compiles gets the sizes of a call with the graph, and another engine is made when they change:
two rows are another program than three.  What it compiles is kept in this user's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engines
from engines.base import Engine
from hyperrt import home
from hyperrt.adapt import Adapter
from hyperrt.bundle import Bundle
from hyperrt.errors import HyperRTError, UsageError

COMPILING = frozenset({"openvino"})  # backends that are faster when they know the sizes
CACHING = frozenset({"openvino"})  # backends that take `cache`

Sizes = Mapping[str, int]


class Graphs:
    """The open graphs of one bundle; not for two threads at once.

    Args:
        bundle: whose.
        backend: one of `engines.BACKENDS`, or "auto".
        threads: CPU threads of one engine call; None lets the backend decide.
        options: the backend's own, see `engines.open`.

    Raises:
        BackendMissing: there is no such backend.
    """

    def __init__(
        self, bundle: Bundle, backend: str, threads: int | None, options: Mapping[str, Any] | None = None
    ) -> None:
        self.bundle = bundle
        self.backend = engines.resolve(backend)
        self._threads = threads
        self._options = dict(options or {})
        self._engines: dict[str, Engine] = {}
        self._adapters: dict[str, Adapter] = {}
        self._closed = False

    @property
    def open_names(self) -> set[str]:
        """Names of the graphs that are open."""
        return set(self._engines)

    def open(self, name: str, sizes: Sizes | None = None) -> Engine:
        """A new engine of a graph, for the caller to close."""
        cache = {"cache": compile_cache()} if self.backend in CACHING else {}
        fixed = sizes if self.backend in COMPILING else None
        path = self.bundle.graph(name)
        return engines.open(path, self.backend, self._threads, fixed, **cache | self._options)

    def engine(self, name: str, sizes: Sizes | None = None) -> Engine:
        """The engine of a graph, opened if it is not; another one than before where the sizes do not fit it.

        Raises:
            UsageError: after `close`.
            engines.EngineError: it cannot be opened.
        """
        if self._closed:
            raise UsageError(
                "the runtime is closed", "close() was called on it", "open another: Runtime.open"
            )
        if name in self._engines and not self._fits(name, sizes or {}):
            self.free(name)
        if name not in self._engines:
            self._engines[name] = self.open(name, sizes)
        return self._engines[name]

    def adapter(self, name: str, vector: str) -> Adapter:
        """What puts a LoRA into the open graph, by its input `vector`."""
        if name not in self._adapters:
            bundle = self.bundle
            self._adapters[name] = Adapter(self.engine(name), vector, bundle.layout, bundle.adapt)
        return self._adapters[name]

    def free(self, name: str) -> None:
        """Close a graph, if it is open."""
        self._adapters.pop(name, None)
        if name in self._engines:
            self._engines.pop(name).close()

    def close(self) -> None:
        """Close all for good; again does nothing."""
        self._closed = True
        for name in list(self._engines):
            self.free(name)

    def _fits(self, name: str, sizes: Sizes) -> bool:
        """Whether the sizes that the open engine was made for, if it was, are these."""
        made_for = {spec.name: spec.shape for spec in self._engines[name].inputs}
        return all(
            not isinstance(fixed, int) or fixed == sizes.get(size, fixed)
            for spec in self.bundle.graphs[name].inputs
            for size, fixed in zip(spec.shape, made_for.get(spec.name, ()), strict=False)
            if isinstance(size, str)
        )


def compile_cache() -> Path | None:
    """This user's folder for compiled graphs, in $HYPERRT_HOME or the XDG cache; made if it is not there.

    None where it cannot be made, or where others may write: what lies there is run.
    """
    try:
        folder = home.base_folder() / "compiled"
        home.make_folder(folder)
        return None if home.distrust(folder.stat()) else folder
    except (OSError, HyperRTError):  # no home, a file in the way, a disk that is full or read-only
        return None
