"""The ONNX Runtime backends: the CPU, and its execution providers for NVIDIA GPUs, CUDA and TensorRT.

Graphs of any size; TensorRT compiles, for every new set of sizes, when it first meets them.  External data is
mapped, not read, because the session is opened by path.  What is bound lies on the device; results are new
arrays on the host.  Figures behind the options: docs/log.md.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from hyperrt.engines import memory
from hyperrt.engines.base import Engine, closed
from hyperrt.engines.cpu import thread_count
from hyperrt.engines.errors import EngineError, EngineInputError, EngineLoadError, EngineMemoryError, listed
from hyperrt.engines.nvidia import driver
from hyperrt.engines.onnx_file import multiplies_halves, tensor_dims
from hyperrt.engines.tensors import Array, TensorSpec

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GRAPH_OPTION = {CUDA: "enable_cuda_graph", TENSORRT: "trt_cuda_graph_enable"}
LIBRARY = {CUDA: "cuda", TENSORRT: "tensorrt"}  # of the provider, in its file's name

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
FATAL = 4  # log severity: errors come as exceptions, once, and are not printed as well
NOISE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/onnxruntime/")
ASKED_FOR = re.compile(r"requested buffer of size (\d+)")
OUT_OF_MEMORY = (
    "failed to allocate memory", "bad_alloc", "bad allocation", "out of memory", "alloc_failed",
    "smaller than requested bytes", "resource temporarily unavailable",
)  # fmt: skip


class OnnxRuntimeEngine(Engine):
    """A graph in an ONNX Runtime session.

    Args:
        session: with the graph.
        device: where what is bound is kept, "cpu" or "cuda".
        index: which of these devices.
    """

    def __init__(self, session: ort.InferenceSession, device: str = "cpu", index: int = 0) -> None:
        super().__init__()
        self._session: ort.InferenceSession | None = session
        self._device, self._index = device, index
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self.weights = tuple(_spec(node) for node in session.get_overridable_initializers())
        # Those that were replaced.  Like `_resident` never changed, only exchanged: a run can keep it.
        self._refitted: dict[str, Any] = {}

    def _run(self, arrays: dict[str, Array], resident: Mapping[str, Any]) -> dict[str, Array]:
        session = self._session
        if session is None:  # another thread closed it after the check
            raise closed()
        with _errors("running the graph failed", EngineError):
            # A binding of this call's own is cheap (a list of pointers) and makes runs independent.
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
        # On the CPU an OrtValue is a view of the array that it is made from, so it gets one of its own.
        own = np.array if self._device == "cpu" else np.asarray
        return self._lent({name: own(array) for name, array in arrays.items()})

    def _lent(self, arrays: dict[str, Array]) -> dict[str, Any]:
        with _errors("binding an input failed", EngineError):
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
    """A graph whose kernels the first run captures as a CUDA graph, which the runs after it launch as one.

    A replay reads and writes the addresses of the capture.  So every input and output has a buffer on the
    device for good: what is fed is copied into it by every run, what is bound when it has changed.  What is
    bound is kept on the host as well.  Runs take turns.

    Args:
        session: with the graph; every size of its inputs and outputs is fixed, and it has no `weights`.
        device: "cuda".
        index: which GPU.
    """

    def __init__(self, session: ort.InferenceSession, device: str = "cuda", index: int = 0) -> None:
        super().__init__(session, device, index)
        self.weights = ()  # a constant that is replaced has another address, which a replay does not read
        self._turn = threading.Lock()
        self._held: dict[str, Array] = {}  # by the buffers, of what is bound
        with _errors("the inputs and outputs do not fit on the device", EngineError):
            self._into = {spec.name: self._buffer(spec) for spec in self.inputs}
            self._out_of = {spec.name: self._buffer(spec) for spec in self.outputs}
            self._binding = session.io_binding()
            for name, buffer in self._into.items():
                self._binding.bind_ortvalue_input(name, buffer)
            for name, buffer in self._out_of.items():
                self._binding.bind_ortvalue_output(name, buffer)

    def _run(self, arrays: dict[str, Array], resident: Mapping[str, Any]) -> dict[str, Array]:
        with self._turn:
            session = self._session
            if session is None:  # another thread closed it after the check
                raise closed()
            with _errors("running the graph failed", EngineError):
                for name, array in {**resident, **arrays}.items():
                    if self._held.get(name) is not array:
                        self._held.pop(name, None)  # until the copy is whole
                        self._into[name].update_inplace(array)
                self._held.update(resident)
                session.run_with_iobinding(self._binding)
                # A copy: `numpy` may be a view of the buffer.
                return {name: np.array(buffer.numpy()) for name, buffer in self._out_of.items()}

    def _upload(self, arrays: dict[str, Array]) -> dict[str, Any]:
        # Not into the buffers yet: a run that has started still computes with what is there.
        return {name: np.array(array) for name, array in arrays.items()}

    def _lent(self, arrays: dict[str, Array]) -> dict[str, Any]:
        return self._upload(arrays)  # which array a buffer holds says what it holds

    def _release(self) -> None:
        with self._turn:
            self._session = self._binding = None
            self._held, self._into, self._out_of = {}, {}, {}

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
        sizes: name of a size -> its value, for good.
        provider: ONNX Runtime's execution provider, `CPU`, `CUDA` or `TENSORRT`.  Operators that it lacks are
            left to CUDA and to the CPU; but where it does not start, nothing stands in for it.
        cuda_graph: launch all kernels of a run as one: what many small ones cost the host is saved.  Only
            where `sizes` fixes every size of the graph's inputs and outputs, and no constant can be refitted;
            others run as without.
        device: which GPU; not used on the CPU.

    Raises:
        EngineInputError: `threads` is less than 1, `provider` is unknown, or `cuda_graph` asked of the CPU.
        EngineLoadError: not an ONNX graph, an unknown operator or type, missing external data, or one that
            cannot be captured.
        EngineMemoryError: memory ran out.
        EngineError: the provider does not start: it, its libraries, the driver or the GPU is missing.
    """
    options = _session_options(thread_count(threads))
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    if provider not in (CPU, CUDA, TENSORRT) or (cuda_graph and provider == CPU):
        raise EngineInputError(
            f"provider is {provider!r}, cuda_graph {cuda_graph}",
            f"known are {CPU}, and for CUDA graphs too {CUDA} and {TENSORRT}",
            "use the backend onnxruntime-cuda or onnxruntime-tensorrt",
        )
    if provider == CPU:
        return OnnxRuntimeEngine(_session(path, options, [CPU]))
    check(provider, device)
    with _errors(f"cannot open the graph {path}", EngineLoadError):
        capture = cuda_graph and _is_fixed(path, sizes or {})
    _load_libraries(provider)
    session = _gpu_session(path, options, provider, capture, device)
    if not capture or session.get_overridable_initializers():
        if capture:  # a refit moves constants to other addresses than were captured
            session = _gpu_session(path, options, provider, False, device)
        engine = OnnxRuntimeEngine(session, "cuda", device)
        if provider == TENSORRT:
            engine.weights = ()  # it compiles constants in, named or not
        return engine
    return CudaGraphEngine(session, "cuda", device)


def check(provider: str = CPU, device: int = 0) -> None:
    """Refuse an execution provider that cannot start here; for `open`, and for `hyperrt doctor`.

    Raises:
        EngineError: the package has no such provider, or there is no driver, or no such GPU, for it.
    """
    there = ort.get_available_providers()
    if provider not in there:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} has no {provider}",
            f"it has: {listed(there)}",
            "run: pip uninstall --yes onnxruntime && pip install 'hyperrt[cuda]'",
        )
    if provider != CPU:
        built_with = getattr(ort, "cuda_version", "").split(".")[0]
        needed = int(built_with) if built_with.isdigit() else None
        found = driver.driver()
        driver.check_cuda(found, needed, "onnxruntime-gpu")
        driver.check_device(found, device)


def _gpu_session(
    path: Path, options: ort.SessionOptions, provider: str, capture: bool, device: int
) -> ort.InferenceSession:
    """A session that the provider runs.

    Raises:
        EngineError: ONNX Runtime left the provider out, which it does without an error of its own.
        EngineLoadError, EngineMemoryError: as `open`.
    """
    where = {"device_id": str(device)}
    # As the graph says: fp32 is not multiplied with the 10 bits of TF32. Half precision has no more bits, and
    # without TF32 its convolutions would not run on the tensor cores: six times the time (docs/log.md).
    with _errors(f"cannot open the graph {path}", EngineLoadError):
        tf32 = "1" if multiplies_halves(path) else "0"
    chosen = {provider: {**where}, CUDA: {**where, "use_tf32": tf32}}
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
            raise  # it is the graph
    raise EngineError(
        f"{provider} does not start",
        _missing_library(provider) or why or "ONNX Runtime does not say why",
        "install NVIDIA's libraries: pip install 'hyperrt[cuda]'"
        + (" 'tensorrt<11'" if provider == TENSORRT else "; or use --backend onnxruntime"),
    )


def _session(path: Path, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
    with _errors(f"cannot open the graph {path}", EngineLoadError):
        # No second try with another provider, which would be announced on stdout.
        return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)


def _load_libraries(provider: str) -> None:
    """NVIDIA's libraries from Python packages, where they are installed so: nobody else looks there."""
    ort.set_default_logger_severity(FATAL)
    with redirect_stdout(io.StringIO()):  # it tells of each that it does not find; others may find it
        ort.preload_dlls()
    if provider == TENSORRT:
        with suppress(ImportError, OSError):
            importlib.import_module("tensorrt")


def _missing_library(provider: str) -> str:
    """What the linker says of the provider's own library; "" where all is there.

    Only after ONNX Runtime has tried: before, the library would not find its host.
    """
    for path in Path(ort.__file__).parent.glob(f"capi/*onnxruntime_providers_{LIBRARY[provider]}.*"):
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            return str(error)
    return ""


def _is_fixed(path: Path, sizes: Mapping[str, int]) -> bool:
    """Whether no size of the file's inputs and outputs is left open."""
    shapes = [dims for side in tensor_dims(path) for dims in side.values()]
    return all(isinstance(dim, int) or dim in sizes for dims in shapes for dim in dims)


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Whatever the file is called: ONNX Runtime's own format can name files that no check here would see.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Threads spin between the operators of a run, where waking them would cost more than the operator,
    # and stop when it ends: an idle session takes nothing from the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _spec(node: Any) -> TensorSpec:
    if node.type not in DTYPES:
        raise EngineLoadError(
            f"the graph's tensor {node.name!r} is a {node.type}", f"known are: {', '.join(DTYPES)}"
        )
    shape = tuple(f"{node.name}_{axis}" if size is None else size for axis, size in enumerate(node.shape))
    return TensorSpec(node.name, shape, DTYPES[node.type])


@contextmanager
def _errors(what: str, kind: type[EngineError]) -> Iterator[None]:
    """ONNX Runtime's exceptions, which have no common base but Exception, as ours."""
    try:
        yield
    except Exception as error:
        text = NOISE.sub("", " ".join(str(error).split()))
        if isinstance(error, MemoryError) or any(sign in text.lower() for sign in OUT_OF_MEMORY):
            size = ASKED_FOR.search(text)
            why = (
                f"no {int(size[1]) / 1e6:.0f} MB could be had at once" if size else f"memory ran out: {text}"
            )
            raise EngineMemoryError(what, why, "use a smaller batch, or end other programs") from error
        do = "check the file, or export the bundle again" if kind is EngineLoadError else ""
        raise kind(what, text, do) from error
