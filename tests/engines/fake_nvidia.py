"""Stand-ins for CUDA and TensorRT in host memory: what engines/tensorrt.py asks of them, faults on demand.

A stream does nothing before somebody waits for it, and memory that was freed or never written holds NaN: what
is not ordered between two streams gives wrong results, every time.

A plan is JSON of the tensors of y = x gain + w, where w is a weight that can be refitted:

    {"inputs": {"x": [2], "gain": [1]}, "outputs": {"y": [2]}, "weights": {"w": 2}}

or, as `build` writes it in place of engines.tensorrt_build's, a graph that ONNX Runtime computes:

    {"onnx": "denoiser.onnx", "sizes": {"rows": 3}}
"""

from __future__ import annotations

import collections
import ctypes
import enum
import functools
import json
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np

import engines


class Code(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100


SAID = {
    Code.cudaErrorMemoryAllocation: b"out of memory",
    Code.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime version",
    Code.cudaErrorNoDevice: b"no CUDA-capable device is detected",
}


class Queue:
    """What was enqueued on a stream."""

    def __init__(self) -> None:
        self.calls: collections.deque[Callable[[], object]] = collections.deque()
        self.done = 0

    def reach(self, count: int) -> None:
        """Run until so many were run since the beginning."""
        while self.done < count:
            self.done += 1
            self.calls.popleft()()

    @property
    def end(self) -> int:
        return self.done + len(self.calls)


class Cuda(ModuleType):
    """`cuda.bindings.runtime`.

    Attributes:
        room: how many allocations still succeed.
        no_gpu: the code of every question for a GPU, where there is none.
        copies: (kind, bytes) of every copy: "up" to the device, "down" from it, "there" on it.
    """

    cudaError_t = Code
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="there"
    )

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.room, self.no_gpu = 10_000, Code.cudaSuccess
        self.memory: dict[int, object] = {}
        self.freed: list[object] = []
        self.copies: list[tuple[str, int]] = []
        self.waits = self.launches = 0
        self.queues: list[Queue] = []
        self.recording: list[object] | None = None

    def enqueue(self, stream, function, *arguments) -> None:
        self.queues[stream].calls.append(functools.partial(function, *arguments))

    def cudaGetErrorString(self, code):
        return Code.cudaSuccess, SAID[code]

    def cudaGetDeviceProperties(self, index):
        return self.no_gpu, SimpleNamespace(name=b"Fake RTX\0\0", major=8, minor=9)

    def cudaMemGetInfo(self):
        return Code.cudaSuccess, 5_000_000, 8_000_000

    def cudaStreamCreateWithFlags(self, flags):
        self.queues.append(Queue())
        return Code.cudaSuccess, len(self.queues) - 1

    def cudaStreamDestroy(self, stream):
        return (Code.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        self.waits += 1
        self.queues[stream].reach(self.queues[stream].end)
        return (Code.cudaSuccess,)

    def cudaDeviceSynchronize(self):
        for queue in self.queues:
            queue.reach(queue.end)
        return (Code.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags):
        return Code.cudaSuccess, SimpleNamespace(queue=None, count=0)

    def cudaEventRecord(self, event, stream):
        event.queue, event.count = self.queues[stream], self.queues[stream].end
        return (Code.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        self.enqueue(stream, event.queue.reach, event.count)
        return (Code.cudaSuccess,)

    def cudaEventDestroy(self, event):
        return (Code.cudaSuccess,)

    def cudaMallocAsync(self, size, stream):
        if self.room <= 0:
            return Code.cudaErrorMemoryAllocation, None
        self.room -= 1
        buffer = ctypes.create_string_buffer(b"\xff" * size, size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return Code.cudaSuccess, ctypes.addressof(buffer)

    def cudaFreeAsync(self, pointer, stream):
        self.enqueue(stream, self._free, pointer)
        return (Code.cudaSuccess,)

    def _free(self, pointer) -> None:
        buffer = self.memory.pop(pointer)
        buffer[:] = b"\xff" * len(buffer)
        self.freed.append(buffer)  # who still reads it finds NaN, and does not crash

    def cudaMemcpyAsync(self, to, source, count, kind, stream):
        self.copies.append((kind, count))
        read_now = ctypes.string_at(source, count) if kind == "up" else source
        self.enqueue(stream, ctypes.memmove, to, read_now, count)
        return (Code.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return (Code.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        graph, self.recording = self.recording, None
        return Code.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph, flags):
        return Code.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph):
        return (Code.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable):
        return (Code.cudaSuccess,)

    def cudaGraphLaunch(self, executable, stream):
        self.launches += 1
        for call in executable:
            self.enqueue(stream, call)
        return (Code.cudaSuccess,)


class TensorRT(ModuleType):
    """`tensorrt`; `fail` names what returns None or False, and `refit_stops` after how many weights."""

    __version__ = "11.4.0.106"
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    TensorLocation = SimpleNamespace(DEVICE="device")

    class ILogger:
        ERROR, INTERNAL_ERROR, INFO = "error", "internal", "info"

        def __init__(self) -> None:
            pass

    def __init__(self, cuda: Cuda) -> None:
        super().__init__("tensorrt")
        self.cuda, self.fail = cuda, set()
        self.refit_stops, self.refit_says = None, "refitting stopped"
        self.addresses: list[tuple[str, int]] = []
        self.Runtime = lambda logger: Runtime(self, logger)
        self.Refitter = lambda engine, logger: Refitter(self, engine, logger)

    def nptype(self, dtype):
        return np.int64 if dtype == "int64" else np.float32

    def Weights(self, dtype, pointer, count):
        return pointer, count


class Runtime:
    def __init__(self, trt, logger) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, plan):
        try:
            plan = json.loads(plan)
            return (OnnxEngine if "onnx" in plan else Engine)(self.trt, self.logger, plan)
        except ValueError:
            self.logger.log("info", "loading")
            self.logger.log("error", "Version tag does not match: 240 vs 239")
            self.logger.log("error", "engine.cpp: it failed")
            return None


class Engine:
    device_memory_size_v2 = 9_000_000

    def __init__(self, trt, logger, plan) -> None:
        self.trt, self.logger, self.plan = trt, logger, plan
        self.shapes = {**plan["inputs"], **plan["outputs"]}
        self.names = list(self.shapes)
        self.num_io_tensors = len(self.names)
        self.weights = {name: np.zeros(count, np.float32) for name, count in plan.get("weights", {}).items()}
        self.refittable = bool(self.weights)

    def get_tensor_name(self, k):
        return self.names[k]

    def get_tensor_mode(self, name):
        return "input" if name in self.plan["inputs"] else "output"

    def get_tensor_shape(self, name):
        return self.shapes[name]

    def get_tensor_dtype(self, name):
        return "float"

    def create_execution_context(self):
        if "context" in self.trt.fail:
            self.logger.log("error", "Cuda Runtime (out of memory)")
            return None
        return Context(self)


class Context:
    def __init__(self, engine) -> None:
        self.engine, self.trt = engine, engine.trt
        self.shapes = dict(engine.shapes)
        self.places: dict[str, int] = {}

    def set_tensor_address(self, name, pointer):
        self.places[name] = pointer
        self.trt.addresses.append((name, pointer))
        return True

    def set_input_shape(self, name, shape):
        if max(shape) > 8:
            self.engine.logger.log("error", "not in the profile")
            return False
        self.shapes[name] = list(shape)
        if name == "x" and -1 in self.engine.shapes["y"]:
            self.shapes["y"] = list(shape)
        return True

    def get_tensor_shape(self, name):
        return self.shapes[name]

    def execute_async_v3(self, stream):
        if "execute" in self.trt.fail:
            self.engine.logger.log("error", "an illegal memory access")
            return False
        # With the addresses of now, as CUDA does.
        compute = functools.partial(self._compute, Places(self.engine, dict(self.places), dict(self.shapes)))
        if self.trt.cuda.recording is None:
            self.trt.cuda.enqueue(stream, compute)
        elif "record" in self.trt.fail:
            return False
        else:
            self.trt.cuda.recording.append(compute)
        return True

    def _compute(self, at):
        x, gain, y = (at(name) for name in ("x", "gain", "y"))
        y[:] = x * gain + (self.engine.weights["w"] if self.engine.weights else 0)
        for name, weight in self.engine.weights.items():
            if name != "w":
                y[:] += weight


class Places:
    """Where the tensors of a run are, flat, by name."""

    def __init__(self, engine, pointers, shapes) -> None:
        self.engine, self.pointers, self.shapes = engine, pointers, shapes

    def __call__(self, name):
        count = int(np.prod(self.shapes[name]))
        kind = ctypes.c_int64 if self.engine.get_tensor_dtype(name) == "int64" else ctypes.c_float
        return np.frombuffer((kind * count).from_address(self.pointers[name]), np.dtype(kind))


class OnnxEngine(Engine):
    """A graph that ONNX Runtime computes where TensorRT would."""

    def __init__(self, trt, logger, plan) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        for name, size in plan["sizes"].items():
            options.add_free_dimension_override_by_name(name, size)
        self.session = ort.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        sides = [
            {node.name: [-1 if isinstance(dim, str) else dim for dim in node.shape] for node in side}
            for side in (self.session.get_inputs(), self.session.get_outputs())
        ]
        super().__init__(trt, logger, {"inputs": sides[0], "outputs": sides[1]})
        self.types = {node.name: node.type for node in self.session.get_inputs()}
        constants = self.session.get_overridable_initializers()
        self.constants = {node.name: node.shape for node in constants}
        self.weights = {name: np.zeros(np.prod(shape), np.float32) for name, shape in self.constants.items()}
        self.refittable = bool(self.weights)

    def get_tensor_dtype(self, name):
        return "int64" if self.types.get(name) == "tensor(int64)" else "float"

    def create_execution_context(self):
        return OnnxContext(self)


class OnnxContext(Context):
    def set_input_shape(self, name, shape):
        self.shapes[name] = list(shape)
        rows = shape[0]  # in every graph of a bundle the outputs have as many as the first input
        for output in self.engine.plan["outputs"]:
            if self.engine.shapes[output][0] == -1 and name == next(iter(self.engine.plan["inputs"])):
                self.shapes[output] = [rows, *self.engine.shapes[output][1:]]
        return True

    def _compute(self, at):
        engine = self.engine
        feeds = {name: at(name).reshape(at.shapes[name]) for name in engine.plan["inputs"]}
        feeds |= {name: engine.weights[name].reshape(shape) for name, shape in engine.constants.items()}
        results = engine.session.run(list(engine.plan["outputs"]), feeds)
        for name, result in zip(engine.plan["outputs"], results, strict=True):
            at(name)[:] = result.ravel()


def build(recipe, progress=None):
    """In place of the compiler."""
    from engines.tensorrt_build import Built

    with open(recipe.output, "w") as file:
        json.dump({"onnx": recipe.onnx, "sizes": dict(recipe.sizes)}, file)
    return Built(0.0, 0, 0, ())


class Refitter:
    weights_validation = True

    def __init__(self, trt, engine, logger) -> None:
        self.trt, self.engine, self.logger = trt, engine, logger
        self.places: dict[str, tuple[int, int]] = {}

    def get_all_weights(self):
        return list(self.engine.weights)

    def get_weights_prototype(self, name):
        return SimpleNamespace(size=len(self.engine.weights[name]), dtype="float")

    def set_named_weights(self, name, weights, location):
        self.places[name] = weights
        return True

    def get_missing_weights(self):
        return ["folded"] if "missing" in self.trt.fail else []

    def refit_cuda_engine_async(self, stream):
        for k, (name, (pointer, count)) in enumerate(self.places.items()):
            if k == self.trt.refit_stops:
                self.logger.log("error", self.trt.refit_says)
                return False
            self.trt.cuda.enqueue(stream, self._write, name, pointer, count)
        return True

    def _write(self, name, pointer, count) -> None:
        floats = (ctypes.c_float * count).from_address(pointer)
        self.engine.weights[name][:] = np.frombuffer(floats, np.float32)


def install(monkeypatch) -> tuple[Cuda, TensorRT]:
    """Put both in the place of the vendor's packages, for engines/cuda.py and engines/tensorrt.py anew."""
    cuda = Cuda()
    trt = TensorRT(cuda)
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.runtime = cuda
    package.bindings = bindings
    for name in ("cuda", "tensorrt"):
        monkeypatch.delitem(sys.modules, f"engines.{name}", raising=False)
        monkeypatch.delattr(engines, name, raising=False)
    for name, module in {"cuda": package, "cuda.bindings": bindings, "tensorrt": trt}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return cuda, trt
