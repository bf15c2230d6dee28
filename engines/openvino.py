"""The OpenVINO backend, on the CPU: compiles the graph when it is opened; bf16 where the processor has it.

OpenVINO forgets what the sizes of a graph are called, so they are read from the file (engines/onnx_file.py).
Results are new arrays.  Figures behind the options: docs/log.md.
"""

from __future__ import annotations

import functools
import io
import os
import re
import shlex
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hyperrt.engines import forks, telemetry

telemetry.import_vendor("openvino")

# ruff: noqa: E402 - what follows finds OpenVINO imported
import openvino as ov
import openvino.opset13 as opset
from openvino.frontend import FrontEndManager

from hyperrt.engines.base import Engine, closed
from hyperrt.engines.cpu import thread_count
from hyperrt.engines.errors import EngineError, EngineInputError, EngineLoadError, EngineMemoryError
from hyperrt.engines.onnx_file import Dims, tensor_dims
from hyperrt.engines.tensors import Array, TensorSpec

DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i8": "int8",
    "u8": "uint8",
    "boolean": "bool",
}
PRECISIONS = ("auto", "f32", "bf16")
# Where in OpenVINO's source an exception was thrown, and how it came from there.
NOISE = re.compile(r"Exception from \S+:\d+: ?|FrontEnd API failed with \w+: ?| at src/\S+:\d+:?")
ASKED_FOR = re.compile(r"Failed to allocate (\d+) bytes")
# A graph in OpenVINO's own format, whose operation has the mark `_precise`.
PORT = '<port id="0" precision="FP32"><dim>1</dim></port>'
MARKED = f"""<net name="marked" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1"><data shape="1" element_type="f32"/>
<output>{PORT}</output></layer>
<layer id="1" name="y" type="Sin" version="opset1"><rt_info><attribute name="precise" version="0"/></rt_info>
<input>{PORT}</input><output>{PORT.replace('"0"', '"1"', 1)}</output></layer>
<layer id="2" name="z" type="Result" version="opset1"><input>{PORT}</input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>
<edge from-layer="1" from-port="1" to-layer="2" to-port="0"/></edges></net>""".encode()
OUT_OF_MEMORY = ("failed to allocate", "bad_alloc", "bad allocation", "out of memory", "out_of_memory")


class OpenVinoEngine(Engine):
    """A graph that OpenVINO compiled.

    Args:
        compile: compiles the graph; called again after a run that failed.
        inputs, outputs: dims of the graph's tensors by name.
    """

    def __init__(
        self, compile: Callable[[], ov.CompiledModel], inputs: Mapping[str, Dims], outputs: Mapping[str, Dims]
    ) -> None:
        super().__init__()
        self._compile = compile
        self._compiling = threading.Lock()
        self._compiled: ov.CompiledModel | None = compile()
        ports = self._compiled
        # An input with a default is none here; an output may share its tensor, and its names, with another.
        self.inputs = tuple(_spec(_name(port, inputs), inputs, port) for port in ports.inputs)
        self.outputs = tuple(
            _spec(name, outputs, port) for name, port in zip(outputs, ports.outputs, strict=True)
        )

    def _run(self, arrays: dict[str, Array], resident: Mapping[str, Any]) -> dict[str, Array]:
        compiled = self._current()
        tensors = {name: _view(array) for name, array in arrays.items()} | dict(resident)
        try:
            with _errors("running the graph failed", EngineError):
                results = _computed(compiled, tensors)
        except EngineError:
            # The sizes of a run that failed stay in what was compiled, and the next run would fail too.
            with self._compiling:
                if self._compiled is compiled:
                    self._compiled = None
            raise
        return {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}

    def _current(self) -> ov.CompiledModel:
        with self._compiling:
            if self._closed:  # by another thread, after the check
                raise closed()
            if self._compiled is None:
                self._compiled = self._compile()
            return self._compiled

    def _upload(self, arrays: dict[str, Array]) -> dict[str, Any]:
        with _errors("binding an input failed", EngineError):
            return {name: ov.Tensor(array) for name, array in arrays.items()}  # a copy

    def _lent(self, arrays: dict[str, Array]) -> dict[str, Any]:
        with _errors("binding an input failed", EngineError):
            return {name: _view(array) for name, array in arrays.items()}

    def _release(self) -> None:
        with self._compiling:
            self._compiled = None


def open(
    path: Path,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    precision: str = "auto",
    cache: Path | None = None,
) -> OpenVinoEngine:
    """Compile an ONNX file.

    Args:
        path: the file; its external data lies beside it.
        threads: within an operator; None for the physical cores that this process may use.
        sizes: name of a size -> its value, for good: the compiled graph is smaller and faster.
        precision: of the arithmetic: "f32", "bf16", or "auto": bf16 where the processor multiplies it.
        cache: folder for compiled graphs, which makes the next opening faster; made if it is not there, for
            this user alone.  As large as the weights.

    Raises:
        EngineInputError: `threads` or `precision` is not taken; `cache` lies in the folder of the graph.
        EngineLoadError: not an ONNX graph, an unknown operator or type, missing external data, sizes that do
            not fit together, or a cache that is a link or that others can reach.
        EngineMemoryError: memory ran out.
        EngineForked: OpenVINO was used before this process was forked.
    """
    core = _core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": thread_count(threads),
        # Two processes with fewer threads than cores would be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": _precision(core, precision),
    }
    if cache is not None:
        settings["CACHE_DIR"] = str(_private(cache, path))
    with _errors(f"cannot open the graph {path}", EngineLoadError):
        inputs, outputs = (_fixed(side, sizes or {}) for side in tensor_dims(path))

    def compile() -> ov.CompiledModel:
        with _errors(f"cannot open the graph {path}", EngineLoadError):
            return core.compile_model(_read(path, inputs), "CPU", settings)

    return OpenVinoEngine(compile, inputs, outputs)


def _core() -> ov.Core:
    """The process's own.

    Raises:
        EngineForked: it was made before this process was forked: its threads are not here.
    """
    core, process = _first_core()
    forks.check(process)
    return core


@functools.cache
def _first_core() -> tuple[ov.Core, int]:
    """One for the process, which is given with it, and never closed.

    Each gives its thread another stack for signal handlers, and when it goes puts back the one that it found:
    of two that end in the order in which they began, the second puts back one that is gone, and the next
    Ctrl-C ends in a segmentation fault.
    """
    return forks.hold(ov.Core()), os.getpid()


def _read(path: Path, inputs: Mapping[str, Dims]) -> ov.Model:
    """The graph, with those sizes fixed that are numbers."""
    # Not Core.read_model: whatever the file is called, it would try six other formats on what is not ONNX.
    frontend = FrontEndManager().load_by_framework("onnx")
    model = frontend.convert(frontend.load(str(path)))
    shapes = {}
    for port in model.inputs:
        dims = inputs[_name(port, inputs)]
        shapes[port] = ov.PartialShape([-1 if isinstance(dim, str) else dim for dim in dims])
    if any(port.partial_shape != shape for port, shape in shapes.items()):
        model.reshape(shapes)
    _keep_fp32(model)
    return model


def _keep_fp32(model: ov.Model) -> None:
    """Mark what must not be rounded to bf16, none of which takes time.

    Angles: with the timestep 999 in bf16 a sine's is off by a radian. What reads a vector among the inputs:
    coefficients. What lies behind the last product with weights: sums that multiply its rounding.
    """
    key, mark = _precise()
    readers = [port.get_node() for port in model.inputs if len(port.get_partial_shape()) <= 1]
    for _ in range(2):  # what takes one out of the vector, and what multiplies with it
        readers = [port.get_node() for node in readers for port in node.output(0).get_target_inputs()]
        for node in readers:
            node.set_rt_info(mark, key)
    waiting = [node for node in model.get_ops() if node.get_type_name() in ("Sin", "Cos", "Result")]
    marked = set()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Unsqueeze":
            node = _as_reshape(node)
        name = node.get_name()
        if name not in marked and not _is_end(node):
            marked.add(name)
            node.set_rt_info(mark, key)
            waiting += [value.get_node() for value in node.input_values()]


def _is_end(node: ov.Node) -> bool:
    """Whether it is an input, a constant, or a product with weights."""
    kind = node.get_type_name()
    if kind == "MatMul":
        weights = node.input_value(1).get_node()
        return weights.get_type_name() in ("Constant", "Convert")
    return kind in ("Parameter", "Constant", "Convolution", "ShapeOf")


def _as_reshape(node: ov.Node) -> ov.Node:
    """A vector's Unsqueeze to a column, as a Reshape: what OpenVINO itself makes of it loses the mark."""
    source, axes = node.input_values()
    if len(source.get_partial_shape()) != 1 or axes.get_node().get_data().tolist() not in ([1], [-1]):
        return node
    while source.get_node().get_type_name() == "Reshape":
        source = source.get_node().input_value(0)
    column = opset.reshape(source, np.array([-1, 1]), special_zero=False)
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(column.output(0))
    return column


@functools.cache
def _precise() -> tuple[str, Any]:
    """OpenVINO's mark "not in fewer bits", its key first: Python can read it from a file, but not make it."""
    model = _core().read_model(io.BytesIO(MARKED), io.BytesIO())
    marks = [dict(node.get_rt_info().items()) for node in model.get_ops() if node.get_type_name() == "Sin"]
    return next(iter(marks[0].items()))


def _precision(core: ov.Core, precision: str) -> str:
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision not in PRECISIONS:
        raise EngineInputError(f"precision is {precision!r}", f"OpenVINO takes {', '.join(PRECISIONS)}")
    if precision == "bf16" and not native:  # OpenVINO would compute in float32, and not say so
        raise EngineInputError(
            "precision is 'bf16'", "this processor does not multiply bfloat16", "use 'auto' or 'f32'"
        )
    return ("bf16" if native else "f32") if precision == "auto" else precision


def _private(cache: Path, path: Path) -> Path:
    """The folder `cache`, of this user alone: what lies there is loaded without another look."""
    cache = Path(cache).absolute()
    if cache.resolve().is_relative_to(path.resolve().parent):
        raise EngineInputError(
            f"the cache {cache} lies in the folder of the graph", "compiled graphs are this machine's own",
            "choose another folder",
        )  # fmt: skip
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = cache.lstat()
    except OSError as error:
        raise EngineLoadError(
            f"cannot make the cache {cache}", str(error), "choose another folder, or none"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise EngineLoadError(
            f"the cache {cache} is a link", "compiled graphs there are run, so no link is followed",
            "name the folder itself",
        )  # fmt: skip
    if os.name == "posix" and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077):
        raise EngineLoadError(
            f"the cache {cache} is not this user's alone", "a compiled graph that others wrote would be run",
            f"choose another folder, or run: chmod 700 {shlex.quote(str(cache))}",
        )  # fmt: skip
    return cache


def _fixed(side: Mapping[str, Dims], sizes: Mapping[str, int]) -> dict[str, Dims]:
    return {
        name: tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)
        for name, dims in side.items()
    }


def _name(port: Any, names: Mapping[str, Dims]) -> str:
    """What the ONNX file calls it: OpenVINO may know a tensor by several names."""
    return next((name for name in names if name in port.names), "")


def _spec(name: str, dims: Mapping[str, Dims], port: Any) -> TensorSpec:
    kind = port.element_type.get_type_name()
    if kind not in DTYPES:
        raise EngineLoadError(
            f"the graph's tensor {name!r} is a tensor({kind})", f"known are: {', '.join(DTYPES)}"
        )
    return TensorSpec(name, dims[name], DTYPES[kind])


def _computed(compiled: ov.CompiledModel, tensors: Mapping[str, ov.Tensor]) -> list[Array]:
    # A request of this call's own is cheap (0.1 ms) and makes runs independent.
    request = compiled.create_infer_request()
    for name, tensor in tensors.items():
        request.set_tensor(name, tensor)
    # Not infer(): with one thread it swallows exceptions and leaves the results of the run before.
    request.start_async()
    request.wait()
    return [np.array(tensor.data) for tensor in request.output_tensors]


def _view(array: Array) -> ov.Tensor:
    """The array itself; a copy where it is read-only, which OpenVINO does not take."""
    return ov.Tensor(array, shared_memory=bool(array.flags.writeable))


@contextmanager
def _errors(what: str, kind: type[EngineError]) -> Iterator[None]:
    """OpenVINO's exceptions, which have no common base but Exception, as ours."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        text = " ".join(NOISE.sub(" ", str(error)).split())
        if isinstance(error, MemoryError) or any(sign in text.lower() for sign in OUT_OF_MEMORY):
            size = ASKED_FOR.search(text)
            why = (
                f"no {int(size[1]) / 1e6:.0f} MB could be had at once" if size else f"memory ran out: {text}"
            )
            raise EngineMemoryError(what, why, "use a smaller batch, or end other programs") from error
        do = "check the file, or export the bundle again" if kind is EngineLoadError else ""
        raise kind(what, text, do) from error
