"""The TensorRT backends, `tensorrt` and `tensorrt-rtx`: run a compiled plan.

A plan comes from engines/nvidia/tensorrt_build.py.  Every input and output has a device buffer with a fixed
address, into which inputs are copied, so that a captured CUDA graph stays valid when the subject, the prompt
or the picture changes.  Only `run` with results on the host waits for the device.  Measurements: docs/log.md.
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
from hyperrt.engines.nvidia.tensorrt_log import RTX, Log
from hyperrt.engines.tensors import Array, TensorSpec

WARM_UP = 2  # runs before a CUDA graph is captured: the first ones allocate, and compile kernels


class TensorRTEngine(Engine):
    """A deserialised plan.

    Bound inputs lie in the buffers of the inputs; the values of `resident` are not read.

    Args:
        trt: the vendor's module.
        log: the logger of `engine`.
        engine: TensorRT's ICudaEngine.
        weights: those that can be refitted, zeros in the plan.
        cuda_graph: whether to capture a run as a CUDA graph; ignored if the plan has open sizes.
        stream: on the GPU on which the plan was deserialised.
    """

    def __init__(
        self,
        trt: Any,
        log: Log,
        engine: Any,
        weights: Sequence[TensorSpec],
        cuda_graph: bool,
        stream: cuda.Stream,
    ) -> None:
        super().__init__()
        self._log, self._engine, self._stream = log, engine, stream
        self._device = threading.Lock()  # one run, bind or refit at a time
        specs = [_spec(trt, engine, engine.get_tensor_name(k)) for k in range(engine.num_io_tensors)]
        modes = {spec.name: engine.get_tensor_mode(spec.name) for spec in specs}
        self.inputs = tuple(spec for spec in specs if modes[spec.name] == trt.TensorIOMode.INPUT)
        self.outputs = tuple(spec for spec in specs if modes[spec.name] != trt.TensorIOMode.INPUT)
        # TensorRT-RTX captures by itself, and cannot be asked to capture again after a refit.
        self._context = _context(trt, log, engine, cuda_graph and not weights)
        self._buffers: dict[str, cuda.Buffer] = {}
        self._open_inputs = {
            spec.name for spec in self.inputs if any(isinstance(dim, str) for dim in spec.shape)
        }
        self._captures = cuda_graph and not self._open_inputs and trt.__name__ != RTX
        self._captured: cuda.CapturedGraph | None = None
        self._runs = 0
        self._weights: _Weights | None = None
        if engine.refittable or weights:
            self._weights = _Weights(trt, log, engine, self._stream, weights)
            self.weights = tuple(weights)
            # A failed refit may have replaced some of them, so they are kept to be restored.
            self._constants = {spec.name: _zeros(spec) for spec in weights}

    def _run(self, arrays: dict[str, Any], resident: Mapping[str, Any]) -> dict[str, Array]:
        with self._running(arrays) as outputs:
            return {name: self._stream.download(buffer) for name, buffer in outputs.items()}

    def _run_on_device(self, arrays: dict[str, Any], resident: Mapping[str, Any]) -> dict[str, Any]:
        with self._running(arrays) as outputs:
            # Copies: the next run writes to the same buffers.
            return {name: self._stream.copy(buffer) for name, buffer in outputs.items()}

    @contextlib.contextmanager
    def _turn(self, what: str) -> Iterator[None]:
        """Let only this thread use the engine, on its GPU; `what` is the first line of CUDA's errors."""
        with self._device, cuda.explained(what):
            self._stream.use()  # TensorRT uses the thread's current GPU
            yield

    @contextlib.contextmanager
    def _running(self, arrays: Mapping[str, Any]) -> Iterator[dict[str, cuda.Buffer]]:
        """Enqueue a run; inside the block no other run writes to the buffers of its outputs."""
        with self._turn("running the graph failed"):
            if self._closed:  # another thread closed it after the check
                raise closed()
            self._copy_to_buffers(arrays)
            outputs = {
                spec.name: self._buffer(spec.name, tuple(self._context.get_tensor_shape(spec.name)))
                for spec in self.outputs
            }
            self._enqueue()
            yield outputs

    def _upload(self, arrays: dict[str, Any]) -> dict[str, Any]:
        with self._turn("binding an input failed"):
            before = dict(self._buffers)
            try:  # allocate all buffers before anything is copied
                for name, array in arrays.items():
                    self._buffer(name, array.shape)
            except EngineError:
                for name in arrays.keys() & before.keys():
                    self._set_buffer(name, before[name])
                raise
            self._copy_to_buffers(arrays)
        return {name: self._buffers[name] for name in arrays}

    def _refit(self, arrays: dict[str, Any]) -> None:
        if self._weights is None:
            raise EngineError("this plan cannot be refitted", "it was compiled without refittable weights")
        with self._turn("refitting the graph failed"):
            self._captured = None  # it may hold old weights, and a new capture takes milliseconds
            self._weights.write(arrays)

    def _copy_to_buffers(self, arrays: Mapping[str, Array | DeviceArray]) -> None:
        self._stream.upload([(array, self._buffer(name, array.shape)) for name, array in arrays.items()])

    def _buffer(self, name: str, shape: tuple[int, ...]) -> cuda.Buffer:
        """The buffer of an input or output; a new one only if its shape changes, in a plan of open sizes."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            dtype = next(spec.dtype for spec in (*self.inputs, *self.outputs) if spec.name == name)
            buffer = self._stream.allocate(shape, dtype)
            self._set_buffer(name, buffer)
        return buffer

    def _set_buffer(self, name: str, buffer: cuda.Buffer) -> None:
        """Set the shape and address of an input or output."""
        if name in self._open_inputs and not self._context.set_input_shape(name, buffer.shape):
            why = self._log.cause()
            raise EngineError(f"the plan does not accept {name!r} of shape {list(buffer.shape)}", why)
        self._context.set_tensor_address(name, buffer.pointer)
        self._buffers[name] = buffer

    def _enqueue(self) -> None:
        """Enqueue a run: launch the captured graph, or execute and perhaps capture it."""
        if self._captured is None and self._captures and self._runs >= WARM_UP:
            try:
                self._captured = self._stream.capture(self._execute)
            except EngineError:  # a plan that cannot be captured still runs
                self._captures = False
        if self._captured is not None:
            self._captured.launch()
        else:
            self._execute()
        self._runs += 1

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._log.error("running the graph failed")

    def _release(self) -> None:
        with self._device:
            self._stream.wait()
            self._captured = self._weights = self._context = self._engine = None
            self._buffers = {}


class _Weights:
    """The refittable weights of an engine, each in a device buffer.

    TensorRT gets names and addresses once; a refit copies into the buffers and enqueues one call.

    Args:
        specs: the weights, as the bundle lists them.

    Raises:
        EngineLoadError: the plan has other weights.
    """

    def __init__(
        self, trt: Any, log: Log, engine: Any, stream: cuda.Stream, specs: Sequence[TensorSpec]
    ) -> None:
        self._log, self._stream = log, stream
        self._refitter = trt.Refitter(engine, log.logger)
        self._refitter.weights_validation = False  # Engine.refit checks names, shapes and types
        self._buffers: dict[str, cuda.Buffer] = {}
        differing = {spec.name for spec in specs} ^ set(self._refitter.get_all_weights())
        if differing:
            why = f"the bundle and the plan differ in {len(differing)} weights, such as {min(differing)!r}"
            raise EngineLoadError("the plan is of another graph", why, "compile the bundle again")
        for spec in specs:
            self._add_buffer(trt, spec)
        # A refit reads all buffers, also of weights that it does not replace.
        stream.upload([(_zeros(spec), self._buffers[spec.name]) for spec in specs])
        missing = self._refitter.get_missing_weights()
        if missing:
            why = f"TensorRT also needs {missing[0]!r}, which was folded into them"
            raise EngineLoadError("the plan cannot be refitted", why, "compile the bundle again")

    def _add_buffer(self, trt: Any, spec: TensorSpec) -> None:
        """Allocate the buffer of a weight, and set it as the weight's source."""
        buffer = self._stream.allocate(tuple(int(size) for size in spec.shape), spec.dtype)
        count = buffer.nbytes // buffer.dtype.itemsize
        prototype = self._refitter.get_weights_prototype(spec.name)
        size, dtype = prototype.size, np.dtype(trt.nptype(prototype.dtype))
        if (size, dtype) != (count, buffer.dtype):
            why = f"the plan has {size} {dtype} numbers, the bundle {count} {buffer.dtype}"
            raise EngineLoadError(f"the weight {spec.name!r} does not fit", why, "compile the bundle again")
        weights = trt.Weights(prototype.dtype, buffer.pointer, count)
        if not self._refitter.set_named_weights(spec.name, weights, trt.TensorLocation.DEVICE):
            raise EngineLoadError(f"the weight {spec.name!r} cannot be refitted", self._log.cause())
        self._buffers[spec.name] = buffer

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Replace weights; after an error some of them may have been replaced."""
        self._stream.upload([(array, self._buffers[name]) for name, array in arrays.items()])
        if not self._refitter.refit_cuda_engine_async(self._stream.handle):
            raise self._log.error("refitting the graph failed")


def target(vendor: str, device: int = 0) -> str:
    """What plans are compiled for to run on a GPU of this machine.

    That is its compute capability for TensorRT-RTX, such as "sm90", and also its name for TensorRT.

    Raises:
        EngineError: there is no such GPU, or no driver.
    """
    gpu = cuda.gpu(device)
    return gpu.sm if vendor == RTX else f"{gpu.sm} {gpu.name}"


def open(
    path: Path,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    vendor: str,
    plan: Path | None = None,
    weights: Sequence[TensorSpec] = (),
    cuda_graph: bool = True,
    device: int = 0,
) -> TensorRTEngine:
    """Open the plan of a graph.

    Args:
        path: the graph, for messages.
        threads, sizes: ignored; the plan was compiled for its sizes.
        vendor: "tensorrt" or "tensorrt_rtx".
        plan: a file that `tensorrt_build.build` wrote, from a trusted folder: it contains executable code.
        weights: those that can be refitted, zeros in the plan.
        cuda_graph: capture a run as a CUDA graph and replay it.
        device: which GPU.

    Raises:
        EngineLoadError: there is no plan, it is for another version or GPU, or it has other weights.
        EngineMemoryError: the GPU is out of memory.
        EngineError: there is no such GPU, or no driver, or TensorRT does not support it.
    """
    if plan is None:
        why = "TensorRT runs compiled plans"
        raise EngineLoadError(f"there is no plan of {path}", why, _compile(path))
    trt = importlib.import_module(vendor)
    cuda.gpu(device)  # raises a clearer error than TensorRT
    with cuda.explained(f"the graph {path} cannot be opened"):
        stream = cuda.Stream(device)  # TensorRT uses its GPU from now on
    log = Log(trt)
    runtime = trt.Runtime(log.logger)  # host code in plans stays forbidden, the default
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        what = f"{vendor} {trt.__version__} does not load the plan of {path.name}"
        raise log.error(what, EngineLoadError, _compile(path))
    try:
        return TensorRTEngine(trt, log, engine, weights, cuda_graph, stream)
    except EngineError:
        raise
    except Exception as error:  # pybind11 maps C++ exceptions to various of Python's
        raise EngineLoadError(f"the plan of {path.name} cannot be used", str(error)) from error


def _compile(path: Path) -> str:
    """The command that compiles the bundle of a graph."""
    return f"compile it: {shlex.join(['hyperrt', 'compile', str(path.parent)])}"


def _context(trt: Any, log: Log, engine: Any, cuda_graph: bool) -> Any:
    """An execution context.

    Raises:
        EngineMemoryError: TensorRT returned None, which means that the device is out of memory.
    """
    if trt.__name__ == RTX:
        config = engine.create_runtime_config()
        whole, none = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE, trt.CudaGraphStrategy.DISABLED
        config.cuda_graph_strategy = whole if cuda_graph else none
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        why = f"{log.cause()}; it takes {engine.device_memory_size_v2 / 1e6:.0f} MB"
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
