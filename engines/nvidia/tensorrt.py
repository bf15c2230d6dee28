"""The TensorRT backends: `tensorrt` and `tensorrt-rtx`, whose packages differ in little, run a compiled plan.

A plan comes from engines/nvidia/tensorrt_build.py. Every tensor has a place of its own on the device, whose
address never changes: inputs are copied there, so a step that was recorded as a CUDA graph stays right when
the subject, the prompt or the picture is another. Nothing waits but `run` with results for the host.
Facts about both packages: docs/log.md.
"""

from __future__ import annotations

import contextlib
import importlib
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperrt.engines.base import Engine, closed
from hyperrt.engines.dlpack import DeviceArray
from hyperrt.engines.errors import EngineError, EngineLoadError, EngineMemoryError
from hyperrt.engines.nvidia import cuda
from hyperrt.engines.tensors import Array, TensorSpec

RTX = "tensorrt_rtx"
# In what TensorRT says
OTHER_GPU = "does not support this compute capability"
OUT_OF_MEMORY = ("out of memory", "outofmemory", "could not be allocated", "memory allocation failed")
WARM_UP = 2  # runs before a CUDA graph is recorded: the first ones allocate, and compile kernels


class Log:
    """A logger for TensorRT that keeps what it says of errors, which the functions themselves do not tell."""

    def __init__(self, trt: Any) -> None:
        errors = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in errors:
                    self.errors.append(message)

        self.logger = Logger()

    def last(self) -> str:
        """What was said since it was asked last: the first error, which is the cause of the others."""
        said, self.logger.errors = self.logger.errors, []
        return " ".join(said[0].split()) if said else "TensorRT does not say why"

    def error(self, what: str, kind: type[EngineError] = EngineError, do: str = "") -> EngineError:
        """The error of a function that has failed: of that kind; where memory or the GPU is why, of that."""
        why = self.last()
        if any(sign in why.lower() for sign in OUT_OF_MEMORY):
            return EngineMemoryError(what, why, "use --low-memory, or end other programs on the GPU")
        if OTHER_GPU in why:  # TensorRT-RTX 1.7.1 on an H100; no plan would load
            return EngineError(what, why, "use a backend that does: --backend onnxruntime-cuda")
        return kind(what, why, do)


class TensorRTEngine(Engine):
    """A plan that was deserialised.

    What is bound lies in the places of the inputs: `resident` names it, and is not read.

    Args:
        trt: the vendor's module.
        log: what the engine was made with.
        engine: its ICudaEngine.
        weights: those that can be refitted, zeros in the plan.
        recording: whether steps are recorded as a CUDA graph; a plan of open sizes never is.
        stream: on the GPU that the plan was deserialised for.
    """

    def __init__(
        self,
        trt: Any,
        log: Log,
        engine: Any,
        weights: Sequence[TensorSpec],
        recording: bool,
        stream: cuda.Stream,
    ) -> None:
        super().__init__()
        self._log, self._engine, self._stream = log, engine, stream
        self._device = threading.Lock()  # one run, or one change of what is resident, at a time
        specs = [_spec(trt, engine, engine.get_tensor_name(k)) for k in range(engine.num_io_tensors)]
        is_input = [engine.get_tensor_mode(spec.name) == trt.TensorIOMode.INPUT for spec in specs]
        self.inputs = tuple(spec for spec, read in zip(specs, is_input, strict=True) if read)
        self.outputs = tuple(spec for spec, read in zip(specs, is_input, strict=True) if not read)
        # TensorRT-RTX records by itself, and cannot be told to do it again after a refit.
        self._context = _context(trt, log, engine, recording and not weights)
        self._places: dict[str, cuda.Buffer] = {}
        self._open_inputs = {
            spec.name for spec in self.inputs if any(isinstance(dim, str) for dim in spec.shape)
        }
        self._recording = recording and not self._open_inputs and trt.__name__ != RTX
        self._recorded: cuda.Recorded | None = None
        self._runs = 0
        self._weights: _Weights | None = None
        if engine.refittable or weights:
            self._weights = _Weights(trt, log, engine, self._stream, weights)
            self.weights = tuple(weights)
            # TensorRT may leave a part of them replaced: what to go back to is kept.
            self._constants = {spec.name: _zeros(spec) for spec in weights}

    def _run(self, arrays: dict[str, Any], resident: Mapping[str, Any]) -> dict[str, Array]:
        with self._running(arrays) as outputs:
            return {name: self._stream.download(place) for name, place in outputs.items()}

    def _run_there(self, arrays: dict[str, Any], resident: Mapping[str, Any]) -> dict[str, Any]:
        with self._running(arrays) as outputs:
            # In memory of their own: the next run writes to the same places.
            return {name: self._stream.copy(place) for name, place in outputs.items()}

    @contextlib.contextmanager
    def _turn(self, what: str) -> Iterator[None]:
        """The engine's GPU for this thread alone; `what` begins an error of CUDA."""
        with self._device, cuda.explained(what):
            self._stream.use()  # TensorRT, too, works on the thread's current one
            yield

    @contextlib.contextmanager
    def _running(self, arrays: Mapping[str, Any]) -> Iterator[dict[str, cuda.Buffer]]:
        """Enqueue a run; the places of its outputs, for as long as no other run writes there."""
        with self._turn("running the graph failed"):
            if self._closed:  # by another thread, after the check
                raise closed()
            self._put(arrays)
            outputs = {
                spec.name: self._place(spec.name, tuple(self._context.get_tensor_shape(spec.name)))
                for spec in self.outputs
            }
            self._enqueue()
            yield outputs

    def _upload(self, arrays: dict[str, Any]) -> dict[str, Any]:
        with self._turn("binding an input failed"):
            before = dict(self._places)
            try:  # what can fail comes first
                for name, array in arrays.items():
                    self._place(name, array.shape)
            except EngineError:
                for name in arrays.keys() & before.keys():
                    self._take(name, before[name])
                raise
            self._put(arrays)
        return {name: self._places[name] for name in arrays}

    def _refit(self, arrays: dict[str, Any]) -> None:
        if self._weights is None:
            raise EngineError("this plan cannot be refitted", "it was compiled without refittable weights")
        with self._turn("refitting the graph failed"):
            self._recorded = None  # nothing says that a recording holds for other weights; another takes ms
            self._weights.write(arrays)

    def _put(self, arrays: Mapping[str, Array | DeviceArray]) -> None:
        self._stream.upload([(array, self._place(name, array.shape)) for name, array in arrays.items()])

    def _place(self, name: str, shape: tuple[int, ...]) -> cuda.Buffer:
        """Where a tensor lies; another place only where a plan of open sizes is run with other ones."""
        place = self._places.get(name)
        if place is None or place.shape != shape:
            dtype = next(spec.dtype for spec in (*self.inputs, *self.outputs) if spec.name == name)
            place = self._stream.allocate(shape, dtype)
            self._take(name, place)
        return place

    def _take(self, name: str, place: cuda.Buffer) -> None:
        """Let the plan have a tensor in a place, of the place's shape."""
        if name in self._open_inputs and not self._context.set_input_shape(name, place.shape):
            why = self._log.last()
            raise EngineError(f"the plan does not take {name!r} of shape {list(place.shape)}", why)
        self._context.set_tensor_address(name, place.pointer)
        self._places[name] = place

    def _enqueue(self) -> None:
        """Run on the stream: the recorded graph, where there is one."""
        if self._recorded is None and self._recording and self._runs >= WARM_UP:
            try:
                self._recorded = self._stream.record(self._execute)
            except EngineError:  # a plan that cannot be recorded runs all the same
                self._recording = False
        if self._recorded is not None:
            self._recorded.launch()
        else:
            self._execute()
        self._runs += 1

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._log.error("running the graph failed")

    def _release(self) -> None:
        with self._device:
            self._stream.wait()
            self._recorded = self._weights = self._context = self._engine = None
            self._places = {}


class _Weights:
    """The refittable weights of an engine, each with a place on the device.

    TensorRT is told of names and places once; a refit writes there and enqueues one call.

    Args:
        wanted: what the bundle says that they are.

    Raises:
        EngineLoadError: they are others.
    """

    def __init__(
        self, trt: Any, log: Log, engine: Any, stream: cuda.Stream, wanted: Sequence[TensorSpec]
    ) -> None:
        self._log, self._stream = log, stream
        self._refitter = trt.Refitter(engine, log.logger)
        self._refitter.weights_validation = False  # hyperrt.engines.base has checked names, shapes and types
        self._places: dict[str, cuda.Buffer] = {}
        differing = {spec.name for spec in wanted} ^ set(self._refitter.get_all_weights())
        if differing:
            why = f"the bundle and the plan differ in {len(differing)} weights, such as {min(differing)!r}"
            raise EngineLoadError("the plan is of another graph", why, "compile the bundle again")
        for spec in wanted:
            self._tell(trt, spec)
        # A refit reads all places, also of weights that it does not replace.
        stream.upload([(_zeros(spec), self._places[spec.name]) for spec in wanted])
        missing = self._refitter.get_missing_weights()
        if missing:
            why = f"TensorRT wants {missing[0]!r} with them, which was folded into them"
            raise EngineLoadError("the plan cannot be refitted", why, "compile the bundle again")

    def _tell(self, trt: Any, spec: TensorSpec) -> None:
        """Give a weight its place."""
        place = self._stream.allocate(tuple(int(size) for size in spec.shape), spec.dtype)
        count = place.nbytes // place.dtype.itemsize
        prototype = self._refitter.get_weights_prototype(spec.name)
        found = prototype.size, np.dtype(trt.nptype(prototype.dtype))
        if found != (count, place.dtype):
            why = f"the plan has {found[0]} {found[1]} numbers, the bundle {count} {place.dtype}"
            raise EngineLoadError(f"the weight {spec.name!r} does not fit", why, "compile it again")
        weights = trt.Weights(prototype.dtype, place.pointer, count)
        if not self._refitter.set_named_weights(spec.name, weights, trt.TensorLocation.DEVICE):
            raise EngineLoadError(f"the weight {spec.name!r} cannot be refitted", self._log.last())
        self._places[spec.name] = place

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Replace weights; on an error a part of them may have been replaced."""
        self._stream.upload([(array, self._places[name]) for name, array in arrays.items()])
        if not self._refitter.refit_cuda_engine_async(self._stream.handle):
            raise self._log.error("refitting the graph failed")


def target(vendor: str, device: int = 0) -> str:
    """What a plan for a GPU of this machine is for: TensorRT-RTX's runs on all of one capability.

    Raises:
        EngineError: there is no such GPU, or no driver.
    """
    found = cuda.device(device)
    return found.sm if vendor == RTX else f"{found.sm} {found.name}"


def open(
    path: Path,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    vendor: str,
    plan: Path | None = None,
    weights: Sequence[TensorSpec] = (),
    recording: bool = True,
    device: int = 0,
) -> TensorRTEngine:
    """Open the plan of a graph.

    Args:
        path: the graph, for messages.
        threads, sizes: not used; the plan was compiled for its sizes.
        vendor: "tensorrt" or "tensorrt_rtx".
        plan: what `tensorrt_build.build` wrote, and nobody else: it is executable code.
        weights: those that can be refitted, zeros in the plan.
        recording: replay a step as a CUDA graph.
        device: which GPU.

    Raises:
        EngineLoadError: there is no plan, it is of another version or card, or has other weights.
        EngineMemoryError: the GPU has no room for it.
        EngineError: there is no such GPU, or no driver, or TensorRT does not support it.
    """
    if plan is None:
        why = "TensorRT runs compiled plans"
        raise EngineLoadError(f"there is no plan of {path}", why, _compile(path))
    trt = importlib.import_module(vendor)
    cuda.device(device)  # without it, what TensorRT says is hard to read
    with cuda.explained(f"the graph {path} cannot be opened"):
        stream = cuda.Stream(device)  # on its GPU TensorRT works from here on
    log = Log(trt)
    runtime = trt.Runtime(log.logger)  # code of the host inside a plan stays forbidden: the default
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        what = f"{vendor} {trt.__version__} does not load the plan of {path.name}"
        raise log.error(what, EngineLoadError, _compile(path))
    try:
        return TensorRTEngine(trt, log, engine, weights, recording, stream)
    except EngineError:
        raise
    except Exception as error:  # pybind11 turns C++ exceptions into any of Python's
        raise EngineLoadError(f"the plan of {path.name} cannot be used", str(error)) from error


def _compile(path: Path) -> str:
    """The command that compiles the bundle of a graph."""
    return f"compile it: {shlex.join(['hyperrt', 'compile', str(path.parent)])}"


def _context(trt: Any, log: Log, engine: Any, recording: bool) -> Any:
    """An execution context; None, as TensorRT returns it, means that the device is full."""
    if trt.__name__ == RTX:
        config = engine.create_runtime_config()
        whole, none = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE, trt.CudaGraphStrategy.DISABLED
        config.cuda_graph_strategy = whole if recording else none
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        why = f"{log.last()}; it takes {engine.device_memory_size_v2 / 1e6:.0f} MB"
        with contextlib.suppress(EngineError):
            why += f", {cuda.memory_free() / 1e6:.0f} MB are free"
        do = "use --low-memory, or a smaller batch"
        raise EngineMemoryError("the GPU has no room to run the graph", why, do)
    return context


def _spec(trt: Any, engine: Any, name: str) -> TensorSpec:
    shape = tuple(
        f"{name}_{axis}" if size < 0 else int(size) for axis, size in enumerate(engine.get_tensor_shape(name))
    )
    return TensorSpec(name, shape, np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name)


def _zeros(spec: TensorSpec) -> Array:
    return np.zeros([int(size) for size in spec.shape], spec.dtype)
