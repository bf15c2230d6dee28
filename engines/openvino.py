"""The OpenVINO backend: compiles a graph for the CPU when it is opened, in bf16 if the processor has it.

OpenVINO drops the names of a graph's sizes, so they are read from the file (engines/onnx_file.py).  Results
are new arrays.  Measurements behind the options: docs/log.md.
"""

from __future__ import annotations

import functools
import io
import os
import re
import shlex
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyperrt.engines import forks, telemetry
from hyperrt.engines.backends import BACKENDS

telemetry.import_vendor("openvino")

# ruff: noqa: E402 - the imports below must come after import_vendor
import openvino as ov
import openvino.opset13 as opset
from openvino.frontend import FrontEndManager

from hyperrt.engines.base import Engine, closed
from hyperrt.engines.cpu import thread_count
from hyperrt.engines.errors import EngineError, EngineInputError, EngineLoadError
from hyperrt.engines.onnx_file import Dims, tensor_dims
from hyperrt.engines.tensors import Array, TensorSpec
from hyperrt.engines.vendor_errors import VendorErrors

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
PRECISIONS = BACKENDS["openvino"].precisions
ERRORS = VendorErrors(
    noise=re.compile(r"Exception from \S+:\d+: ?|FrontEnd API failed with \w+: ?| at src/\S+:\d+:?"),
    out_of_memory=("failed to allocate", "bad_alloc", "bad allocation", "out of memory", "out_of_memory"),
    requested=re.compile(r"Failed to allocate (\d+) bytes"),
)
# A graph in OpenVINO's format, x -> Sin -> z; Sin has the attribute of `_fp32_attribute`.
PORT = '<port id="0" precision="FP32"><dim>1</dim></port>'
PRECISE_SIN = f"""<net name="precise" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1"><data shape="1" element_type="f32"/>
<output>{PORT}</output></layer>
<layer id="1" name="y" type="Sin" version="opset1"><rt_info><attribute name="precise" version="0"/></rt_info>
<input>{PORT}</input><output>{PORT.replace('"0"', '"1"', 1)}</output></layer>
<layer id="2" name="z" type="Result" version="opset1"><input>{PORT}</input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>
<edge from-layer="1" from-port="1" to-layer="2" to-port="0"/></edges></net>""".encode()


class OpenVinoEngine(Engine):
    """A graph that OpenVINO compiled.

    Args:
        compile: compiles the graph; called again after a failed run.
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
        # An input with a default is not a port.  Outputs can share a tensor and its names.
        self.inputs = tuple(_spec(_name(port, inputs), inputs, port) for port in ports.inputs)
        self.outputs = tuple(
            _spec(name, outputs, port) for name, port in zip(outputs, ports.outputs, strict=True)
        )

    def _run(self, arrays: dict[str, Array], resident: Mapping[str, Any]) -> dict[str, Array]:
        compiled = self._current()
        tensors = {name: _view(array) for name, array in arrays.items()} | dict(resident)
        try:
            with ERRORS.raised_as(EngineError, "running the graph failed"):
                results = _infer(compiled, tensors)
        except EngineError:
            # The compiled graph keeps the sizes of a failed run, and the next run would fail too.
            with self._compiling:
                if self._compiled is compiled:
                    self._compiled = None
            raise
        return {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}

    def _current(self) -> ov.CompiledModel:
        with self._compiling:
            if self._closed:  # another thread closed it after the check
                raise closed()
            if self._compiled is None:
                self._compiled = self._compile()
            return self._compiled

    def _upload(self, arrays: dict[str, Array]) -> dict[str, Any]:
        with ERRORS.raised_as(EngineError, "binding an input failed"):
            return {name: ov.Tensor(array) for name, array in arrays.items()}  # a copy

    def _borrow(self, arrays: dict[str, Array]) -> dict[str, Any]:
        with ERRORS.raised_as(EngineError, "binding an input failed"):
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
        sizes: name of a size -> its fixed value, which makes the compiled graph smaller and faster.
        precision: of the arithmetic: "f32", "bf16", or "auto": bf16 if the processor multiplies it.
        cache: folder for compiled graphs, which makes the next `open` faster; created with access for this
            user alone.  It takes as much disk space as the weights.

    Raises:
        EngineInputError: `threads` or `precision` is not accepted, or `cache` lies in the graph's folder.
        EngineLoadError: not an ONNX graph, an unknown operator or type, missing external data, sizes that do
            not fit together, or a cache that is a link or that other users can access.
        EngineMemoryError: memory ran out.
        EngineForked: OpenVINO was used before this process was forked.
    """
    core = _core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": thread_count(threads),
        # Pinning would put two processes with few threads on the same cores.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": _precision(core, precision),
    }
    if cache is not None:
        settings["CACHE_DIR"] = str(_private(cache, path))
    with ERRORS.raised_as(EngineLoadError, f"cannot open the graph {path}"):
        inputs, outputs = (_fixed(side, sizes or {}) for side in tensor_dims(path))

    def compile() -> ov.CompiledModel:
        with ERRORS.raised_as(EngineLoadError, f"cannot open the graph {path}"):
            return core.compile_model(_read(path, inputs), "CPU", settings)

    return OpenVinoEngine(compile, inputs, outputs)


def _core() -> ov.Core:
    """The process's ov.Core.

    Raises:
        EngineForked: it was created before this process was forked.
    """
    core, process = _first_core()
    forks.check(process)
    return core


@functools.cache
def _first_core() -> tuple[ov.Core, int]:
    """One ov.Core per process, never closed, and the id of the process that created it.

    A Core gives its thread another stack for signal handlers, and restores the previous one at its end.  If
    two Cores end in the order in which they were created, the second restores a stack that was freed, and the
    next Ctrl-C is a segmentation fault.
    """
    return forks.keep(ov.Core()), os.getpid()


def _read(path: Path, inputs: Mapping[str, Dims]) -> ov.Model:
    """Read the graph and fix the sizes that are numbers in `inputs`."""
    # Not Core.read_model, which tries six other formats on a file that is not ONNX.
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
    """Keep three kinds of operations in fp32 when OpenVINO computes in bf16; all of them are cheap.

    In the graph of a step (`denoiser`) these are the operations in brackets:

        timestep -----> [x frequencies -> Sin, Cos] -> product with weights -> ...         (1)
        coefficients -> [Gather -> x latents] -> UNet                                      (2)
        UNet -> last product with weights -> [guidance sum -> solver update] -> Result     (3)

    (1) Everything that computes the argument of Sin and Cos: with the timestep 999 in bf16 it is off by up to
    two radians.  (2) The next two operations after an input with at most one dimension: a coefficient scales
    every element.  (3) Everything after the last product with weights: the guidance sum and the solver
    multiply rounding errors.
    """
    keep = _after_vectors(model) + _before(model, ("Sin", "Cos", "Result"))
    key, attribute = _fp32_attribute()
    for node in keep:
        node.set_rt_info(attribute, key)


def _after_vectors(model: ov.Model) -> list[ov.Node]:
    """The next two operations after each input that has at most one dimension."""
    nodes = [port.get_node() for port in model.inputs if len(port.get_partial_shape()) <= 1]
    readers: list[ov.Node] = []
    for _ in range(2):
        nodes = [port.get_node() for node in nodes for port in node.output(0).get_target_inputs()]
        readers += nodes
    return readers


def _before(model: ov.Model, kinds: tuple[str, ...]) -> list[ov.Node]:
    """Operations of these kinds and all that they depend on, back to a product with weights or a source."""
    waiting = [node for node in model.get_ops() if node.get_type_name() in kinds]
    nodes: dict[str, ov.Node] = {}
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Unsqueeze":
            node = _as_reshape(node)
        if node.get_name() not in nodes and not _ends_search(node):
            nodes[node.get_name()] = node
            waiting += [value.get_node() for value in node.input_values()]
    return list(nodes.values())


def _ends_search(node: ov.Node) -> bool:
    """Whether it is an input, a constant, a shape, or a product with weights."""
    kind = node.get_type_name()
    if kind == "MatMul":
        weights = node.input_value(1).get_node()
        return weights.get_type_name() in ("Constant", "Convert")
    return kind in ("Parameter", "Constant", "Convolution", "ShapeOf")


def _as_reshape(node: ov.Node) -> ov.Node:
    """Replace the Unsqueeze of a vector to a column by a Reshape.

    OpenVINO replaces it as well, but then loses the attribute that keeps it in fp32.
    """
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
def _fp32_attribute() -> tuple[str, Any]:
    """Key and value of the runtime attribute that keeps an operation in fp32.

    It is `ov::DisablePrecisionConversion`, in older versions `DisableFP16Compression`, in files "precise":
    in bf16 mode the CPU plugin still computes an operation that has it in fp32 (OpenVINO's pull requests
    20625, 21440, 34311).  Python cannot create one, so it is read from a small graph in OpenVINO's format.
    """
    model = _core().read_model(io.BytesIO(PRECISE_SIN), io.BytesIO())
    (sin,) = (node for node in model.get_ops() if node.get_type_name() == "Sin")
    ((key, attribute),) = sin.get_rt_info().items()
    return key, attribute


def _precision(core: ov.Core, precision: str) -> str:
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision not in PRECISIONS:
        raise EngineInputError(f"precision is {precision!r}", f"OpenVINO accepts {', '.join(PRECISIONS)}")
    if precision == "bf16" and not native:  # OpenVINO would compute in fp32 without a warning
        raise EngineInputError(
            "precision is 'bf16'", "this processor does not multiply bfloat16", "use 'auto' or 'f32'"
        )
    return ("bf16" if native else "f32") if precision == "auto" else precision


def _private(cache: Path, path: Path) -> Path:
    """Create the folder `cache`, or check that only this user can access it: its content is executed."""
    cache = Path(cache).absolute()
    if cache.resolve().is_relative_to(path.resolve().parent):
        raise EngineInputError(
            f"the cache {cache} lies in the folder of the graph",
            "compiled graphs are for this machine alone", "choose another folder",
        )  # fmt: skip
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache.lstat()
    except OSError as error:
        raise EngineLoadError(
            f"cannot make the cache {cache}", str(error), "choose another folder, or leave cache out"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise EngineLoadError(
            f"the cache {cache} is a link", "its compiled graphs are executed, so links are not followed",
            "name the folder itself",
        )  # fmt: skip
    if os.name == "posix" and (status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077):
        raise EngineLoadError(
            f"others can access the cache {cache}", "its compiled graphs are executed",
            f"choose another folder, or run: chmod 700 {shlex.quote(str(cache))}",
        )  # fmt: skip
    return cache


def _fixed(side: Mapping[str, Dims], sizes: Mapping[str, int]) -> dict[str, Dims]:
    return {
        name: tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)
        for name, dims in side.items()
    }


def _name(port: Any, names: Mapping[str, Dims]) -> str:
    """A tensor's name in the ONNX file; OpenVINO may have several names for it."""
    return next((name for name in names if name in port.names), "")


def _spec(name: str, dims: Mapping[str, Dims], port: Any) -> TensorSpec:
    kind = port.element_type.get_type_name()
    if kind not in DTYPES:
        raise EngineLoadError(
            f"the graph's tensor {name!r} is a tensor({kind})", f"supported are: {', '.join(DTYPES)}"
        )
    return TensorSpec(name, dims[name], DTYPES[kind])


def _infer(compiled: ov.CompiledModel, tensors: Mapping[str, ov.Tensor]) -> list[Array]:
    # A new request per call is cheap (0.1 ms) and makes runs independent.
    request = compiled.create_infer_request()
    for name, tensor in tensors.items():
        request.set_tensor(name, tensor)
    # Not infer(): with one thread it swallows exceptions and returns the results of the previous run.
    request.start_async()
    request.wait()
    return [np.array(tensor.data) for tensor in request.output_tensors]


def _view(array: Array) -> ov.Tensor:
    """The array without a copy, unless it is read-only, which OpenVINO does not accept."""
    return ov.Tensor(array, shared_memory=bool(array.flags.writeable))
