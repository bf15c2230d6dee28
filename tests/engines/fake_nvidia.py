"""A stand-in for TensorRT, beside that for CUDA: what engines/nvidia/tensorrt.py asks of it, faults on
demand.

A plan is JSON of the tensors of y = x gain + w, where w is a weight that can be refitted:

    {"inputs": {"x": [2], "gain": [1]}, "outputs": {"y": [2]}, "weights": {"w": 2}}

or, as `build` writes it in place of tensorrt_build's, a graph that ONNX Runtime computes:

    {"onnx": "denoiser.onnx", "sizes": {"rows": 3}}

whose first output is that times `factor`, if the plan has one: it computes something else.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np

from hyperrt import engines
from hyperrt.engines import nvidia
from tests.engines.fake_cudart import Code, Cuda

__all__ = ["Code", "Cuda", "TensorRT", "build", "install", "machine", "open_plan"]
VERSION = "11.4.0.106"


class TensorRT(ModuleType):
    """`tensorrt` or `tensorrt_rtx`.

    Attributes:
        fail: names what returns None or False.
        says: what the log then says, if it is not what is usual.
        refit_stops: after how many weights; None: it does not.
        loaded: how often something was handed to the deserialiser.
    """

    __version__ = VERSION
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="none")
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    TensorLocation = SimpleNamespace(DEVICE="device")

    class ILogger:
        ERROR, INTERNAL_ERROR, INFO = "error", "internal", "info"

        def __init__(self) -> None:
            pass

    def __init__(self, cuda: Cuda, name: str = "tensorrt") -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.cuda, self.fail, self.says = cuda, set(), ""
        self.refit_stops, self.loaded = None, 0
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
        self.trt.loaded += 1
        if "deserialize" in self.trt.fail:
            self.logger.log("error", self.trt.says or "it is damaged")
            return None
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
        self.device = trt.cuda.current
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

    def works_here(self) -> bool:
        """Whether the thread is on the GPU that this was loaded on."""
        if self.device != self.trt.cuda.current:
            self.logger.log("error", "the engine is of another device")
        return self.device == self.trt.cuda.current

    def create_runtime_config(self):
        return SimpleNamespace()

    def create_execution_context(self, config=None):
        if "context" in self.trt.fail:
            self.logger.log("error", self.trt.says or "Cuda Runtime (out of memory)")
            return None
        return self.context(self) if self.works_here() else None


class Context:
    """What runs an engine."""

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
            self.engine.logger.log("error", self.trt.says or "an illegal memory access")
            return False
        if not self.engine.works_here():
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


Engine.context = Context


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
        self.factor = plan.get("factor", 1)
        self.types = {node.name: node.type for node in self.session.get_inputs()}
        constants = self.session.get_overridable_initializers()
        self.constants = {node.name: node.shape for node in constants}
        self.weights = {name: np.zeros(np.prod(shape), np.float32) for name, shape in self.constants.items()}
        self.refittable = bool(self.weights)

    def get_tensor_dtype(self, name):
        return "int64" if self.types.get(name) == "tensor(int64)" else "float"


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
        factors = [engine.factor] + [1] * len(results)
        for name, result, factor in zip(engine.plan["outputs"], results, factors, strict=False):
            at(name)[:] = factor * result.ravel()


OnnxEngine.context = OnnxContext  # defined after it


def build(recipe, progress=None, **more):
    """In place of the compiler."""
    from hyperrt.engines.nvidia.tensorrt_build import Built

    with open(recipe.output, "w") as file:
        json.dump({"onnx": recipe.onnx, "sizes": dict(recipe.sizes), **more}, file)
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
        if not self.engine.works_here():
            return False
        for k, (name, (pointer, count)) in enumerate(self.places.items()):
            if k == self.trt.refit_stops:
                self.logger.log("error", self.trt.says or "refitting stopped")
                return False
            self.trt.cuda.enqueue(stream, self._write, name, pointer, count)
        return True

    def _write(self, name, pointer, count) -> None:
        floats = (ctypes.c_float * count).from_address(pointer)
        self.engine.weights[name][:] = np.frombuffer(floats, np.float32)


def install(monkeypatch, vendor="tensorrt") -> tuple[Cuda, TensorRT]:
    """Put both in the place of the vendor's packages, for cuda.py and tensorrt.py anew."""
    cuda = Cuda()
    trt = TensorRT(cuda, vendor)
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.runtime = cuda
    package.bindings = bindings
    for name in ("cuda", "tensorrt"):
        monkeypatch.delitem(sys.modules, f"hyperrt.engines.nvidia.{name}", raising=False)
        monkeypatch.delattr(nvidia, name, raising=False)
    for name, module in {"cuda": package, "cuda.bindings": bindings, vendor: trt}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return cuda, trt


def open_plan(folder, plan, **options) -> engines.Engine:
    """An engine of the backend `tensorrt` on a plan, as bytes or as said above, which a folder gets."""
    (folder / "graph.onnx").write_bytes(b"onnx")
    path = folder / "plan"
    path.write_bytes(plan if isinstance(plan, bytes) else json.dumps(plan).encode())
    return engines.open(folder / "graph.onnx", "tensorrt", plan=path, **options)


def machine(monkeypatch, home, vendor="tensorrt") -> tuple[Cuda, TensorRT]:
    """A machine with a GPU of sm89, a compiler, and a cache of plans of its own in `home`."""
    from hyperrt.plans import build as compiling

    monkeypatch.setenv("HYPERRT_HOME", str(home))
    monkeypatch.setattr(compiling.tensorrt_build, "build", build)
    monkeypatch.setattr(compiling, "version", lambda backend: VERSION)
    return install(monkeypatch, vendor)
