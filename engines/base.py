"""The contract of an engine (one open graph with named tensors), its checks, and `open`.

In a shape a number is a fixed size, and a name stands for any size.  Tensors: engines/tensors.py.  To add a
backend: CONTRIBUTING.md.
"""

from __future__ import annotations

import inspect
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
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

COMMON = ("path", "threads", "sizes", "device")  # arguments that every backend has; the others are options


class Engine(ABC):
    """One open graph.

    Threads: every method may be called from any thread.  A run computes with the tensors that were bound when
    it started; `bind`, `unbind` and `refit` affect runs that start after they return.  `close` lets started
    runs finish.  A caller that needs several calls as a unit (bind, then run) needs a lock.

    Attributes:
        inputs: every input, bound or not.
        outputs: what `run` returns.
        weights: the constants that `refit` can replace; may be empty.
        on_device: as `Backend` has it; set by `open`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...] = ()
    on_device: bool = False

    def __init__(self) -> None:
        # What is bound.  Replaced as a whole and never changed, so that a run can keep it.
        self._resident: dict[str, Any] = {}
        # The last complete set of `weights`.  A backend whose `_refit` may fail half way stores the graph's
        # constants here when it opens; None means that its `_refit` is all or nothing.
        self._constants: Tensors | None = None
        self._unusable = ""  # why the graph holds a mixture of constants, if it does
        self._lock = threading.Lock()
        self._closed = False
        self._process = forks.watch(self)

    def run(self, feeds: Tensors, host: bool = True) -> dict[str, Any]:
        """Compute all outputs; the results belong to the caller.

        Args:
            feeds: every input that is not bound, and nothing else.
            host: whether to copy results to the host.  If not, an engine that is `on_device` returns them as
                `DeviceArray`, and may return before they are computed.

        Raises:
            EngineInputError: a tensor is missing, unknown, bound already, or has the wrong shape or type.
            EngineMemoryError: memory ran out.
            EngineError: the backend failed.
            EngineUnusable: the last `refit` failed and left a mixture of old and new constants.
            EngineForked: this process was forked after the engine was opened.
            EngineClosed: after `close`.
        """
        resident = self._open_resident()
        if self._unusable:
            raise unusable(self._unusable)
        bound = sorted(resident.keys() & feeds.keys())
        if bound:
            raise EngineInputError(
                f"input {bound[0]!r} is bound already",
                "a bound input cannot be fed as well",
                f"leave it out, or unbind {bound}",
            )
        arrays = self._checked(self.inputs, feeds, "input")
        missing = [spec.name for spec in self.inputs if spec.name not in arrays and spec.name not in resident]
        if missing:
            raise EngineInputError(
                f"input {missing[0]!r} is missing", f"the graph also needs {', '.join(missing)}"
            )
        if self.on_device and not host:
            return self._run_on_device(arrays, resident)
        return self._run(arrays, resident)

    def bind(self, tensors: Tensors, copy: bool = True) -> None:
        """Copy inputs to where the graph reads them and keep them there; binding again replaces.

        All or nothing: after an error the inputs that were bound before still are.

        Args:
            copy: if False, an engine on the CPU may borrow the caller's arrays (zero-copy).  A caller that
                writes to one binds it again before the next run.

        Raises:
            EngineInputError, EngineMemoryError, EngineError, EngineClosed: as in `run`.
        """
        self._open_resident()
        arrays = self._checked(self.inputs, tensors, "input")
        uploaded = self._upload(arrays) if copy else self._borrow(arrays)
        with self._lock:
            self._resident = self._open_resident() | uploaded

    def unbind(self, names: Iterable[str]) -> None:
        """Free bound inputs; after that `run` needs them as feeds.

        Raises:
            EngineInputError: a name is not bound; nothing is freed.
            EngineClosed: after `close`.
        """
        freed = set(names)
        with self._lock:
            resident = self._open_resident()
            unknown = sorted(freed - resident.keys())
            if unknown:
                why = f"these inputs are bound: {listed(resident)}"
                raise EngineInputError(f"input {unknown[0]!r} is not bound", why)
            self._resident = {name: tensor for name, tensor in resident.items() if name not in freed}

    def refit(self, weights: Tensors) -> None:
        """Replace some of the graph's constants, all or nothing: after an error the old ones are in place.

        If a backend fails half way, the old constants are written back.  If that fails too, `run` raises
        EngineUnusable until a refit of any constants succeeds, which then writes the others as well.

        Raises:
            EngineInputError: a tensor is not one of `weights`, or has the wrong shape or type.
            EngineMemoryError, EngineError: the backend failed, or has no constants that can be replaced.
            EngineUnusable: the backend failed, and failed again while it wrote the old constants back.
            EngineClosed: after `close`.
        """
        self._open_resident()
        if not self.weights:
            raise EngineError(
                "this graph cannot be refitted",
                "it has no constants that its backend can replace",
                "export the bundle with --adapt inputs",
            )
        arrays = self._checked(self.weights, weights, "weight")
        with self._lock:
            if self._constants is None:
                self._refit(arrays)
                return
            # Copies: the caller may have changed its arrays by the time a later refit fails.
            copies = {n: a if isinstance(a, DeviceArray) else np.array(a) for n, a in arrays.items()}
            new = {**self._constants, **copies}
            names = new if self._unusable else arrays
            try:
                self._refit({name: new[name] for name in names})
            except BaseException as error:
                self._write_back(self._constants, names, error)
                raise
            self._constants, self._unusable = new, ""

    def _write_back(self, old: Tensors, names: Iterable[str], cause: BaseException) -> None:
        """Restore constants after a `_refit` that failed.

        Args:
            old: all constants as they were before.
            names: those that the failed refit was to write.
            cause: its error.

        Raises:
            EngineUnusable: this failed as well.
        """
        try:
            self._refit({name: old[name] for name in names})
        except BaseException as error:
            first, second = (" ".join(str(failure).split()) for failure in (cause, error))
            self._unusable = f"a refit failed ({first}), and writing the old ones back failed too ({second})"
            raise unusable(self._unusable) from cause
        self._unusable = ""

    def close(self) -> None:
        """Free the graph and what is bound; does nothing if it is closed, or in a forked process."""
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
        """Compute all outputs; `arrays` and `resident` together are all inputs, and are checked."""

    def _run_on_device(self, arrays: dict[str, Any], resident: Mapping[str, Any]) -> dict[str, Any]:
        """As `_run`, but the results stay where they were computed."""
        return self._run(arrays, resident)

    @abstractmethod
    def _upload(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Copy arrays into the form that `_run` takes as `resident`."""

    def _borrow(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """As `_upload`, but without a copy where the backend can read the arrays themselves."""
        return self._upload(arrays)

    def _refit(self, arrays: dict[str, Any]) -> None:  # noqa: B027 - optional
        """Replace constants; needs `_constants` if it may fail half way.  The caller holds the lock."""

    @abstractmethod
    def _release(self) -> None:
        """Free what the backend holds; called once."""

    def _checked(self, specs: Iterable[TensorSpec], tensors: Tensors, role: str) -> dict[str, Any]:
        """`tensors`, checked; copied to the host if the engine computes there."""
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
    """The error of an engine that a failed refit left with a mixture of constants."""
    what = "the engine holds a mixture of old and new constants"
    return EngineUnusable(what, why, "refit it again, or open it again")


# What backends take beside the arguments of every backend: precision, cache, plan, weights, cuda_graph ...
Option = str | int | None | Path | Sequence[TensorSpec]


def open(
    path: Path | str,
    backend: str = "onnxruntime",
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    device: int = 0,
    **options: Option,
) -> Engine:
    """Open a graph.

    Args:
        path: the graph's file.
        backend: one of `BACKENDS`, or "auto": see `resolve`.
        threads: within an operator; None for the physical cores that this process may use.
        sizes: name of a size in the graph's shapes -> its value, which is then fixed: the specs have the
            number, and a backend that compiles makes a smaller and faster graph.  Names that the graph does
            not have are ignored, so that one table serves all graphs of a bundle.
        device: which of the GPUs that CUDA shows this process; backends without a GPU accept only 0.  Side
            effect: it becomes the calling thread's current CUDA device.
        options: of this backend, see `open` in its file.

    Raises:
        BackendMissing: no such backend, or its package is not installed.
        EngineInputError: `threads` or a size is less than 1, `device` is not 0 and the backend runs on the
            CPU, or the backend has no such option.
        EngineLoadError: there is no such file, or it is not a graph that this backend can run.
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
    entry = BACKENDS[backend]
    _check_options(backend, module, options)
    if entry.nvidia:
        options["device"] = device
    elif device:  # refused, not ignored: two runtimes meant for two devices would share the CPU
        why = f"the backend {backend!r} does not run on a GPU"
        raise EngineInputError(f"the device is {device}", why, "leave device out, or choose a GPU backend")
    engine = cast(Engine, module.open(path, threads=threads, sizes=sizes, **options, **entry.options))
    engine.on_device = entry.on_device
    return engine


def _check_options(backend: str, module: Any, options: Mapping[str, Any]) -> None:
    """Refuse an option that the backend's module does not have, or that the backend's entry fixes."""
    parameters = inspect.signature(module.open).parameters
    accepted = set(parameters) - {*COMMON, *BACKENDS[backend].options}
    unknown = [name for name in options if name not in accepted]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        why = f"its options are: {listed(accepted)}"
        raise EngineInputError(f"the backend {backend!r} has no option {unknown[0]!r}", why, "leave it out")
