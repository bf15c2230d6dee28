"""The ONNX Runtime backends: the CPU, and the execution providers CUDA and TensorRT for NVIDIA GPUs.

Sizes may change between runs; the TensorRT provider compiles when it first meets a set of sizes.  External
data is memory-mapped, because the session is opened by path.  Bound inputs lie on the device; results are new
arrays on the host.  Measurements behind the options: docs/log.md.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import re
import threading
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from hyperrt.engines import memory
from hyperrt.engines.base import Engine, closed
from hyperrt.engines.cpu import thread_count
from hyperrt.engines.errors import EngineError, EngineInputError, EngineLoadError, listed
from hyperrt.engines.nvidia import driver
from hyperrt.engines.onnx_file import multiplies_halves, tensor_dims
from hyperrt.engines.tensors import Array, TensorSpec
from hyperrt.engines.vendor_errors import VendorErrors

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GRAPH_OPTION = {CUDA: "enable_cuda_graph", TENSORRT: "trt_cuda_graph_enable"}
LIBRARY = {CUDA: "cuda", TENSORRT: "tensorrt"}  # part of the file name of the provider's library

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
FATAL = 4  # log severity: errors are raised as exceptions, so they are not printed as well
ERRORS = VendorErrors(
    noise=re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/onnxruntime/"),
    out_of_memory=(
        "failed to allocate memory", "bad_alloc", "bad allocation", "out of memory", "alloc_failed",
        "smaller than requested bytes", "resource temporarily unavailable",
    ),
    requested=re.compile(r"requested buffer of size (\d+)"),
)  # fmt: skip


class OnnxRuntimeEngine(Engine):
    """A graph in an ONNX Runtime session.

    Args:
        session: holds the graph.
        device: where bound inputs are kept, "cpu" or "cuda".
        index: which of these devices.
    """

    def __init__(self, session: ort.InferenceSession, device: str = "cpu", index: int = 0) -> None:
        super().__init__()
        self._session: ort.InferenceSession | None = session
        self._device, self._index = device, index
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self.weights = tuple(_spec(node) for node in session.get_overridable_initializers())
        # The replaced constants.  Replaced as a whole and never changed, so that a run can keep it.
        self._refitted: dict[str, Any] = {}

    def _run(self, arrays: dict[str, Array], resident: Mapping[str, Any]) -> dict[str, Array]:
        session = self._session
        if session is None:  # another thread closed it after the check
            raise closed()
        with ERRORS.raised_as(EngineError, "running the graph failed"):
            # A new binding per call is cheap (a list of pointers) and makes runs independent.
            binding = session.io_binding()
            for name, value in {**self._refitted, **resident}.items():
                binding.bind_ortvalue_input(name, value)
            for name, array in arrays.items():
                binding.bind_cpu_input(name, array)
            for spec in self.outputs:
                binding.bind_output(spec.name)
            session.run_with_iobinding(binding)
            results = binding.copy_outputs_to_cpu()
        return {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}

    def _upload(self, arrays: dict[str, Array]) -> dict[str, Any]:
        # On the CPU an OrtValue is a view of its array, so it gets a copy.
        copy = np.array if self._device == "cpu" else np.asarray
        return self._borrow({name: copy(array) for name, array in arrays.items()})

    def _borrow(self, arrays: dict[str, Array]) -> dict[str, Any]:
        with ERRORS.raised_as(EngineError, "binding an input failed"):
            return {
                name: ort.OrtValue.ortvalue_from_numpy(array, self._device, self._index)
                for name, array in arrays.items()
            }

    def _refit(self, arrays: dict[str, Array]) -> None:
        self._refitted = self._refitted | self._upload(arrays)

    def _release(self) -> None:
        self._session = None
        memory.give_back()


class CudaGraphEngine(OnnxRuntimeEngine):
    """A graph that the first run captures as a CUDA graph and later runs replay.

    A replay reads and writes the captured addresses, so every input and output has a permanent buffer on the
    device.  Each run copies its feeds into their buffers, and bound inputs if they changed.  Bound inputs are
    kept on the host as well.  Runs take turns.

    Args:
        session: holds the graph; every size of its inputs and outputs is fixed, and it has no `weights`.
        device: "cuda".
        index: which GPU.
    """

    def __init__(self, session: ort.InferenceSession, device: str = "cuda", index: int = 0) -> None:
        super().__init__(session, device, index)
        self.weights = ()  # a replaced constant has another address, which a replay does not read
        self._turn = threading.Lock()
        self._in_buffers: dict[str, Array] = {}  # the bound arrays that the buffers contain
        with ERRORS.raised_as(EngineError, "the inputs and outputs do not fit on the device"):
            self._input_buffers = {spec.name: self._buffer(spec) for spec in self.inputs}
            self._output_buffers = {spec.name: self._buffer(spec) for spec in self.outputs}
            self._binding = session.io_binding()
            for name, buffer in self._input_buffers.items():
                self._binding.bind_ortvalue_input(name, buffer)
            for name, buffer in self._output_buffers.items():
                self._binding.bind_ortvalue_output(name, buffer)

    def _run(self, arrays: dict[str, Array], resident: Mapping[str, Any]) -> dict[str, Array]:
        with self._turn:
            session = self._session
            if session is None:  # another thread closed it after the check
                raise closed()
            with ERRORS.raised_as(EngineError, "running the graph failed"):
                for name, array in {**resident, **arrays}.items():
                    if self._in_buffers.get(name) is not array:
                        self._in_buffers.pop(name, None)  # the copy may fail
                        self._input_buffers[name].update_inplace(array)
                self._in_buffers.update(resident)
                session.run_with_iobinding(self._binding)
                # A copy: `numpy` may return a view of the buffer.
                return {name: np.array(buffer.numpy()) for name, buffer in self._output_buffers.items()}

    def _upload(self, arrays: dict[str, Array]) -> dict[str, Any]:
        # Not into the buffers: a run that has started still reads them.
        return {name: np.array(array) for name, array in arrays.items()}

    def _borrow(self, arrays: dict[str, Array]) -> dict[str, Any]:
        return self._upload(arrays)  # `_run` compares arrays by identity: they must be ours

    def _release(self) -> None:
        with self._turn:
            self._session = self._binding = None
            self._in_buffers, self._input_buffers, self._output_buffers = {}, {}, {}

    def _buffer(self, spec: TensorSpec) -> Any:
        kind = np.dtype(spec.dtype).type
        return ort.OrtValue.ortvalue_from_shape_and_type(list(spec.shape), kind, self._device, self._index)


def open(
    path: Path,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    provider: str = CPU,
    cuda_graph: bool = False,
    device: int = 0,
) -> OnnxRuntimeEngine:
    """Open an ONNX file.

    Args:
        path: the file; its external data lies beside it.
        threads: within an operator on the CPU; None for the physical cores that this process may use.
        sizes: name of a size -> its fixed value.
        provider: ONNX Runtime's execution provider, `CPU`, `CUDA` or `TENSORRT`.  Operators that it lacks run
            on CUDA or the CPU; a provider that does not start is an error.
        cuda_graph: capture a run as a CUDA graph, which saves the host the launch of every kernel.  Ignored
            unless `sizes` fixes every size of the graph's inputs and outputs, and if constants can be
            refitted.
        device: which GPU; not used on the CPU.

    Raises:
        EngineInputError: `threads` is less than 1, `provider` is unknown, or `cuda_graph` is set for the CPU.
        EngineLoadError: not an ONNX graph, an unknown operator or type, missing external data, or a graph
            that cannot be captured.
        EngineMemoryError: memory ran out.
        EngineError: the provider does not start: it, its libraries, the driver or the GPU is missing.
    """
    options = _session_options(thread_count(threads))
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    if provider not in (CPU, CUDA, TENSORRT) or (cuda_graph and provider == CPU):
        raise EngineInputError(
            f"provider is {provider!r}, cuda_graph {cuda_graph}",
            f"the providers are {CPU}, and, also with CUDA graphs, {CUDA} and {TENSORRT}",
            "use the backend onnxruntime-cuda or onnxruntime-tensorrt",
        )
    if provider == CPU:
        return OnnxRuntimeEngine(_session(path, options, [CPU]))
    check(provider, device)
    with ERRORS.raised_as(EngineLoadError, f"cannot open the graph {path}"):
        capture = cuda_graph and _is_fixed(path, sizes or {})
    _load_libraries(provider)
    session = _gpu_session(path, options, provider, capture, device)
    if not capture or session.get_overridable_initializers():
        if capture:  # a refit moves constants away from the captured addresses
            session = _gpu_session(path, options, provider, False, device)
        engine = OnnxRuntimeEngine(session, "cuda", device)
        if provider == TENSORRT:
            engine.weights = ()  # it compiles constants into its engine
        return engine
    return CudaGraphEngine(session, "cuda", device)


def check(provider: str = CPU, device: int = 0) -> None:
    """Refuse an execution provider that cannot start here; for `open` and `hyperrt doctor`.

    Raises:
        EngineError: the package lacks the provider, or the driver or the GPU is missing.
    """
    available = ort.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} has no {provider}",
            f"it has: {listed(available)}",
            "run: pip uninstall --yes onnxruntime && pip install 'hyperrt[cuda]'",
        )
    if provider != CPU:
        built_with = getattr(ort, "cuda_version", "").split(".")[0]
        needed = int(built_with) if built_with.isdigit() else None
        installed = driver.driver()
        driver.check_cuda(installed, needed, "onnxruntime-gpu")
        driver.check_device(installed, device)


def _gpu_session(
    path: Path, options: ort.SessionOptions, provider: str, capture: bool, device: int
) -> ort.InferenceSession:
    """A session that uses the provider.

    Raises:
        EngineError: ONNX Runtime dropped the provider, for which it raises no error itself.
        EngineLoadError, EngineMemoryError: as `open`.
    """
    options_of_device = {"device_id": str(device)}
    # Products in fp32 must not be rounded to the 10 bits of TF32.  For half precision that loses nothing, and
    # convolutions use the tensor cores only if TF32 is allowed: six times faster (docs/log.md).
    with ERRORS.raised_as(EngineLoadError, f"cannot open the graph {path}"):
        tf32 = "1" if multiplies_halves(path) else "0"
    chosen = {provider: {**options_of_device}, CUDA: {**options_of_device, "use_tf32": tf32}}
    if capture:
        chosen[provider][GRAPH_OPTION[provider]] = "1"
    why = ""
    try:
        session = _session(path, options, list(chosen.items()))
        if provider in session.get_providers():
            return session
    except EngineLoadError as error:
        why = error.why
        if not _missing_library(provider):
            raise  # the graph is at fault
    raise EngineError(
        f"{provider} does not start",
        _missing_library(provider) or why or "ONNX Runtime does not say why",
        "install NVIDIA's libraries: pip install 'hyperrt[cuda]'"
        + (" 'tensorrt<11'" if provider == TENSORRT else "; or use --backend onnxruntime"),
    )


def _session(path: Path, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
    with ERRORS.raised_as(EngineLoadError, f"cannot open the graph {path}"):
        # No fallback to another provider, which ONNX Runtime would announce on stdout.
        return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)


def _load_libraries(provider: str) -> None:
    """Load NVIDIA's libraries if they are installed as Python packages, where the linker does not look."""
    ort.set_default_logger_severity(FATAL)
    with redirect_stdout(io.StringIO()):  # it prints every library it misses, which the system may have
        ort.preload_dlls()
    if provider == TENSORRT:
        with suppress(ImportError, OSError):
            importlib.import_module("tensorrt")


def _missing_library(provider: str) -> str:
    """The linker's error for the provider's library; "" if it loads.

    Call it after ONNX Runtime has tried: the library needs symbols that are loaded then.
    """
    for path in Path(ort.__file__).parent.glob(f"capi/*onnxruntime_providers_{LIBRARY[provider]}.*"):
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            return str(error)
    return ""


def _is_fixed(path: Path, sizes: Mapping[str, int]) -> bool:
    """Whether every size of the file's inputs and outputs is fixed."""
    shapes = [dims for side in tensor_dims(path) for dims in side.values()]
    return all(isinstance(dim, int) or dim in sizes for dims in shapes for dim in dims)


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Whatever the file is called: ONNX Runtime's own format can refer to files that were never checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Threads spin between the operators of a run, because waking them can take longer than an operator does.
    # They stop at its end, so that an idle session leaves the cores to others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _spec(node: Any) -> TensorSpec:
    if node.type not in DTYPES:
        raise EngineLoadError(
            f"the graph's tensor {node.name!r} is a {node.type}", f"supported are: {', '.join(DTYPES)}"
        )
    shape = tuple(f"{node.name}_{axis}" if size is None else size for axis, size in enumerate(node.shape))
    return TensorSpec(node.name, shape, DTYPES[node.type])
