"""The ONNX Runtime backend, on the CPU: graphs of any size, no compile step.

External data is mapped, not read, because the session is opened by path.  Results are new arrays.
Figures behind the options: docs/log.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from engines.base import Array, Engine, EngineError, EngineLoadError, EngineMemoryError, TensorSpec, closed
from engines.cores import thread_count

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
OUT_OF_MEMORY = ("failed to allocate memory", "bad_alloc", "bad allocation", "out of memory")


class OnnxRuntimeEngine(Engine):
    """A graph in an ONNX Runtime session."""

    def __init__(self, session: ort.InferenceSession) -> None:
        super().__init__()
        self._session: ort.InferenceSession | None = session
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
        with _errors("binding an input failed", EngineError):
            return {name: ort.OrtValue.ortvalue_from_numpy(np.array(array)) for name, array in arrays.items()}

    def _refit(self, arrays: dict[str, Array]) -> None:
        self._refitted = self._refitted | self._upload(arrays)

    def _release(self) -> None:
        self._session = None


def open(
    path: Path, threads: int | None = None, sizes: Mapping[str, int] | None = None
) -> OnnxRuntimeEngine:
    """Open an ONNX file.

    Args:
        path: the file; its external data lies beside it.
        threads: within an operator; None for the physical cores that this process may use.
        sizes: name of a size -> its value, for good.

    Raises:
        EngineInputError: `threads` is less than 1.
        EngineLoadError: not an ONNX graph, an unknown operator or type, or missing external data.
        EngineMemoryError: memory ran out.
    """
    options = _session_options(thread_count(threads))
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    with _errors(f"cannot open the graph {path}", EngineLoadError):
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return OnnxRuntimeEngine(session)


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
