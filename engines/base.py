"""Engine contract: one open graph with named tensors; its checks, its errors, and how a backend is opened.

In a shape a number is a fixed size, and a name stands for any size.  Tensors: engines/tensors.py.
To add a backend: a module here with `open(path, **options) -> Engine`, one entry in engines/backends.py, one
extra in pyproject.toml, and its graph in FILES in tests/backends.py.
"""

from __future__ import annotations

import inspect
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from hyperrt.engines import forks
from hyperrt.engines.backends import BACKENDS, load, resolve
from hyperrt.engines.dlpack import DeviceArray
from hyperrt.engines.errors import (
    EngineClosed,
    EngineError,
    EngineInputError,
    EngineLoadError,
    EngineUnusable,
    listed,
)
from hyperrt.engines.tensors import Array, Tensors, TensorSpec, checked

GIVEN = ("path", "threads", "sizes", "device")  # arguments of `open` that are no options of a backend's own


class Engine(ABC):
    """One open graph.

    Threads: every method may be called from any thread.  A run computes with the tensors that were bound when
    it started; `bind`, `unbind` and `refit` reach the runs that start after they return.  `close` lets runs
    that have started finish. Calls that belong together (bind, then run) need a lock of the caller's.

    Attributes:
        inputs: what `run` takes, less what is bound.
        outputs: what `run` returns.
        weights: the constants that `refit` can replace; empty where the backend or the graph has none.
        on_device: as `Backend` has it; set by `open`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...] = ()
    on_device: bool = False

    def __init__(self) -> None:
        # Replaced as a whole and never changed, so that a run can keep it.
        self._resident: dict[str, Any] = {}
        # All of `weights` as they were last whole.  A backend whose `_refit` may fail half way puts those of
        # the graph here when it opens; None: its `_refit` is all or nothing.
        self._constants: Tensors | None = None
        self._unusable = ""  # or why the graph holds constants of two sets
        self._lock = threading.Lock()
        self._closed = False
        self._process = forks.watch(self)

    def run(self, feeds: Tensors, host: bool = True) -> dict[str, Any]:
        """Compute all outputs; the results belong to the caller.

        Args:
            feeds: every input that is not bound, and nothing else.
            host: whether results are wanted on the host.  If not, an engine that is `on_device` returns them
                as `DeviceArray`, and may return before they are computed.

        Raises:
            EngineInputError: a tensor is missing, unknown, bound already, or of another shape or type.
            EngineMemoryError: memory ran out.
            EngineError: the backend failed.
            EngineUnusable: the last `refit` failed, and left constants of two sets.
            EngineForked: this process was forked off the one that opened the engine.
            EngineClosed: after `close`.
        """
        resident = self._open_resident()
        if self._unusable:
            raise unusable(self._unusable)
        bound = sorted(resident.keys() & feeds.keys())
        if bound:
            raise EngineInputError(
                f"input {bound[0]!r} is bound already",
                "a bound input is not fed",
                f"leave it out, or unbind {bound}",
            )
        arrays = self._taken(self.inputs, feeds, "input")
        missing = [spec.name for spec in self.inputs if spec.name not in arrays and spec.name not in resident]
        if missing:
            raise EngineInputError(
                f"input {missing[0]!r} is missing", f"the graph also needs {', '.join(missing)}"
            )
        return self._run(arrays, resident) if host else self._run_there(arrays, resident)

    def bind(self, tensors: Tensors, copy: bool = True) -> None:
        """Copy inputs to where the graph reads them and keep them there; binding again replaces.

        All or nothing: on an error, what was bound before stays.

        Args:
            copy: if not, an engine on the CPU may read them where they lie: whoever writes to them binds
                them again before the next run.

        Raises:
            EngineInputError, EngineMemoryError, EngineError, EngineClosed: as in `run`.
        """
        self._open_resident()
        arrays = self._taken(self.inputs, tensors, "input")
        uploaded = self._upload(arrays) if copy else self._lent(arrays)
        with self._lock:
            self._resident = self._open_resident() | uploaded

    def unbind(self, names: Iterable[str]) -> None:
        """Free inputs that are bound; `run` takes them again.

        Raises:
            EngineInputError: a name is not bound; nothing is freed.
            EngineClosed: after `close`.
        """
        gone = set(names)
        with self._lock:
            resident = self._open_resident()
            unknown = sorted(gone - resident.keys())
            if unknown:
                raise EngineInputError(f"input {unknown[0]!r} is not bound", f"bound are: {listed(resident)}")
            self._resident = {name: tensor for name, tensor in resident.items() if name not in gone}

    def refit(self, weights: Tensors) -> None:
        """Replace some of the graph's constants, all or nothing: on an error the old ones are in place.

        Where a backend failed half way, they are written back.  If that fails too, `run` refuses until a
        refit succeeds, of whatever constants: it writes the others as well, as they were.

        Raises:
            EngineInputError: a tensor is not one of `weights`, or of another shape or type.
            EngineMemoryError, EngineError: the backend failed, or has no constants that can be replaced.
            EngineUnusable: the backend failed, and again when the old constants were to be written back.
            EngineClosed: after `close`.
        """
        self._open_resident()
        if not self.weights:
            raise EngineError(
                "this graph cannot be refitted",
                "it has no constants that its backend can replace",
                "export the bundle with the LoRA as inputs",
            )
        arrays = self._taken(self.weights, weights, "weight")
        with self._lock:
            if self._constants is None:
                self._refit(arrays)
                return
            # Copies: a later refit that fails must not find what the caller made of them since.
            kept = {n: a if isinstance(a, DeviceArray) else np.array(a) for n, a in arrays.items()}
            new = {**self._constants, **kept}
            names = new if self._unusable else arrays
            try:
                self._refit({name: new[name] for name in names})
            except BaseException as error:
                self._write_back(self._constants, names, error)
                raise
            self._constants, self._unusable = new, ""

    def _write_back(self, old: Tensors, names: Iterable[str], cause: BaseException) -> None:
        """The constants of these names as they were before a `_refit` that failed."""
        try:
            self._refit({name: old[name] for name in names})
        except BaseException as error:
            first, then = (" ".join(str(failure).split()) for failure in (cause, error))
            self._unusable = f"a refit failed ({first}), and so did writing the old ones back ({then})"
            raise unusable(self._unusable) from cause
        self._unusable = ""

    def close(self) -> None:
        """Free the graph and all that is bound; closing again, or in a forked process, does nothing."""
        if self._process != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._resident = {}
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _run(self, arrays: dict[str, Any], resident: Mapping[str, Any]) -> dict[str, Array]:
        """Compute; `arrays` and `resident` together are all inputs, and are checked."""

    def _run_there(self, arrays: dict[str, Any], resident: Mapping[str, Any]) -> dict[str, Any]:
        """As `_run`, with the results left where they were computed."""
        return self._run(arrays, resident)

    @abstractmethod
    def _upload(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Copies, in the form in which `_run` takes them as `resident`."""

    def _lent(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """As `_upload`, but of the arrays themselves where the backend can read them."""
        return self._upload(arrays)

    def _refit(self, arrays: dict[str, Any]) -> None:  # noqa: B027 - optional
        """Replace constants; if it may fail half way, `_constants` must be set.  One at a time."""

    @abstractmethod
    def _release(self) -> None:
        """Give up what the backend holds; called once."""

    def _taken(self, specs: Iterable[TensorSpec], tensors: Tensors, role: str) -> dict[str, Any]:
        """`tensors`, checked, and on the host where the engine runs there."""
        arrays = checked(specs, tensors, role)
        return arrays if self.on_device else {name: np.asarray(array) for name, array in arrays.items()}

    def _open_resident(self) -> dict[str, Any]:
        forks.check(self._process)
        if self._closed:
            raise closed()
        return self._resident


def closed() -> EngineClosed:
    """The error of a use after `close`."""
    return EngineClosed("the engine is closed", "it was used after close()", "open it again: engines.open")


def unusable(why: str) -> EngineUnusable:
    """The error of an engine whose constants are of two sets."""
    return EngineUnusable("the engine holds constants of two sets", why, "refit it again, or open it again")


def open(
    path: Path | str,
    backend: str = "onnxruntime",
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    device: int = 0,
    **options: Any,
) -> Engine:
    """Open a graph.

    Args:
        path: the graph's file.
        backend: one of `BACKENDS`, or "auto": see `resolve`.
        threads: within an operator; None for the physical cores that this process may use.
        sizes: name of a size in the graph's shapes -> its value, for good: the specs then have the number.  A
            backend that compiles makes a smaller and faster graph of it.  Names that the graph does not have
            are left out, so that one table serves all graphs of a bundle.
        device: which of the GPUs that CUDA shows this process, for backends that run on one; others have 0
            alone.  A call leaves it the calling thread's current device of CUDA.
        options: the backend's own.

    Raises:
        BackendMissing: no such backend, or its package is not installed.
        EngineInputError: `threads` or a size is less than 1, `device` is not 0 where there are no others, or
            an option is not one that is taken.
        EngineLoadError: the file is not there, or is not a graph that this backend can run.
        EngineMemoryError: memory ran out.
        EngineError: the backend is installed but does not start, or there is no such `device`.
    """
    backend = resolve(backend)
    module = load(backend)
    path = Path(path)
    if not path.is_file():
        why = "it is not a regular file" if os.path.lexists(path) else "there is no such file"
        raise EngineLoadError(
            f"cannot open the graph {path}", why, "check the path, or export the bundle again"
        )
    for name, size in (sizes or {}).items():
        if size < 1:
            raise EngineInputError(f"the size {name!r} is {size}", "a size is at least 1")
    about = BACKENDS[backend]
    _check_options(backend, module, options)
    if about.nvidia:
        options["device"] = device
    elif device:  # not ignored: two runtimes that were to be apart would share a processor
        why = f"the backend {backend!r} runs on no GPU"
        raise EngineInputError(f"the device is {device}", why, "leave it out, or name a backend that does")
    engine = cast(Engine, module.open(path, threads=threads, sizes=sizes, **options, **about.options))
    engine.on_device = about.on_device
    return engine


def _check_options(backend: str, module: Any, options: Mapping[str, Any]) -> None:
    """Refuse an option that the backend's module does not have, or that the backend fixes."""
    taken = inspect.signature(module.open).parameters
    known = set(taken) - {*GIVEN, *BACKENDS[backend].options}
    unknown = [name for name in options if name not in known]
    if unknown and not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        why = f"its options are: {listed(known)}"
        raise EngineInputError(f"the backend {backend!r} has no option {unknown[0]!r}", why, "leave it out")
