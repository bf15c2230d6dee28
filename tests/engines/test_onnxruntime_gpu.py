"""ONNX Runtime on NVIDIA GPUs: what is refused, what it is asked for, and the bookkeeping of a CUDA graph.

Without a GPU: ONNX Runtime is the CPU's own where values matter, and a stand-in where a provider does.
"""

from __future__ import annotations

import functools
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.engines import EngineClosed, EngineError, EngineInputError, EngineLoadError
from tests.backends import FEEDS, LORA, STEP, W, X, Y
from tests.engines import fake_cuda
from tests.engines.fake_cuda import H100, NEW, OLD

ort = pytest.importorskip("onnxruntime")
backend = pytest.importorskip("hyperrt.engines.onnxruntime")
GRAPH = Path(__file__).parent / "graphs" / "affine.onnx"
TINY = Path(__file__).parents[2] / "hyperrt" / "bundles" / "tiny"
SIZES = {"rows": 2, "subjects": 1}
GPU_BACKENDS = ("onnxruntime-cuda", "onnxruntime-tensorrt")


# What is refused, and what ONNX Runtime is asked for


class Wheel:
    """A stand-in for the package: the providers that it has, those that start, and what it was asked."""

    def __init__(self, has=(backend.TENSORRT, backend.CUDA, backend.CPU), starts=None, fails=None):
        self.has, self.fails = list(has), fails
        self.starts = self.has if starts is None else list(starts)
        self.asked, self.fallback, self.said = None, None, []

    def session(self, path, options, providers, enable_fallback):
        self.asked, self.fallback = providers, enable_fallback
        if self.fails:
            raise self.fails
        real = ort.InferenceSession(path, options, providers=[backend.CPU])
        names = [one if isinstance(one, str) else one[0] for one in providers]
        real.get_providers = lambda: [name for name in [*names, backend.CPU] if name in self.starts]
        return real

    def preload_dlls(self):
        print("Failed to load libcublas.so.13")
        self.said.append("preload")


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """wheel(**options): onnxruntime-gpu on a machine with two H100, their memory being the host's."""

    def install(**options):
        found = Wheel(**options)
        changed = {
            "__version__": "1.31.1", "cuda_version": "13.0",
            "__file__": str(tmp_path / "ort" / "__init__.py"),
            "get_available_providers": lambda: found.has, "InferenceSession": found.session,
            "preload_dlls": found.preload_dlls, "set_default_logger_severity": found.said.append,
        }  # fmt: skip
        monkeypatch.setattr(backend, "ort", types.SimpleNamespace(**{**vars(ort), **changed}))
        return found

    fake_cuda.install(monkeypatch, tmp_path, H100, H100)
    return install


def refused(name, what, why, do, **options):
    with pytest.raises(EngineError) as caught:
        engines.open(GRAPH, name, **options)
    error = caught.value
    assert type(error) is EngineError and error.code == 7
    assert str(error).count("\n") == 2
    assert what in error.what and why in error.why and do in error.do


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_the_cpus_package_is_refused_with_the_one_to_install(name):
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this is the package for GPUs")
    refused(name, "has no ", "it has: ", "pip install 'hyperrt[cuda]'")


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_machine_without_a_driver_is_refused(wheel, monkeypatch, name):
    found = wheel()
    fake_cuda.uninstall(monkeypatch)
    refused(name, "no NVIDIA driver", "libcuda.so.1", "another backend")
    assert found.asked is None


def test_a_machine_without_a_gpu_is_refused(wheel, monkeypatch, tmp_path):
    wheel()
    fake_cuda.install(monkeypatch, tmp_path)
    refused("onnxruntime-cuda", "no NVIDIA GPU is visible", "shows none", "nvidia-smi")


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(wheel, name):
    found = wheel()
    refused(name, "no NVIDIA GPU 2", "sees 2 of them: 0, 1", "CUDA_VISIBLE_DEVICES", device=2)
    assert found.asked is None


def test_a_driver_too_old_for_the_package_is_refused(wheel, monkeypatch, tmp_path):
    wheel()
    fake_cuda.install(monkeypatch, tmp_path, H100, cuda=OLD)
    refused("onnxruntime-cuda", "too old for onnxruntime-gpu", "needs CUDA 13", "580 or later")


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_provider_that_is_left_out_without_an_error_is_noticed(wheel, name, capfd):
    wheel(starts=[backend.CPU])
    refused(name, "does not start", "does not say why", "pip install 'hyperrt[cuda]'")
    assert capfd.readouterr() == ("", "")


def test_tensorrt_is_missed_also_where_cuda_could_stand_in(wheel):
    wheel(starts=[backend.CUDA, backend.CPU])
    refused("onnxruntime-tensorrt", "TensorrtExecutionProvider does not start", "", "'tensorrt<11'")


@pytest.mark.parametrize("fails", [None, RuntimeError("Please install TensorRT libraries")])
def test_a_library_that_the_provider_lacks_is_named(wheel, tmp_path, fails):
    capi = tmp_path / "ort" / "capi"
    capi.mkdir(parents=True)
    (capi / "libonnxruntime_providers_tensorrt.so").write_bytes(b"no library")
    wheel(starts=[backend.CPU], fails=fails)
    refused("onnxruntime-tensorrt", "does not start", "libonnxruntime_providers_tensorrt.so", "tensorrt<11")


def test_a_graph_that_the_provider_refuses_is_not_called_a_missing_library(wheel):
    wheel(
        fails=RuntimeError("all compute graph nodes have not been partitioned to the CUDAExecutionProvider")
    )
    with pytest.raises(EngineLoadError, match="have not been partitioned"):
        engines.open(GRAPH, "onnxruntime-cuda")


AUTO = {
    "a GPU and its package": ({}, (H100,), NEW, "onnxruntime-cuda"),
    "no GPU": ({}, (), NEW, "onnxruntime"),
    "a driver too old": ({}, (H100,), OLD, "onnxruntime"),
    "the processors' package over the other": ({"has": [backend.CPU]}, (H100,), NEW, "onnxruntime"),
}


@pytest.mark.parametrize(("options", "gpus", "driver", "chosen"), AUTO.values(), ids=AUTO)
def test_auto_is_the_gpu_where_its_package_can_use_one(
    wheel, monkeypatch, tmp_path, options, gpus, driver, chosen
):
    wheel(**options)
    fake_cuda.install(monkeypatch, tmp_path, *gpus, cuda=driver)
    package = ModuleSpec("onnxruntime", None, is_package=True)
    package.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(
        "hyperrt.engines.backends.find_spec", lambda name: package if name == "onnxruntime" else None
    )
    assert engines.resolve("auto") == "onnxruntime"  # without the provider's library
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").touch()
    assert engines.resolve("auto") == chosen


FIRST = {"device_id": "0"}
ASKED = {
    "cuda": ("onnxruntime-cuda", {}, [(backend.CUDA, FIRST | {"use_tf32": "0"})]),
    "cuda, captured": (
        "onnxruntime-cuda",
        {"sizes": SIZES, "cuda_graph": True},
        [(backend.CUDA, FIRST | {"use_tf32": "0", "enable_cuda_graph": "1"})],
    ),
    "cuda, a size left open": (
        "onnxruntime-cuda",
        {"sizes": {"rows": 2}, "cuda_graph": True},
        [(backend.CUDA, FIRST | {"use_tf32": "0"})],
    ),
    "tensorrt, the second GPU": (
        "onnxruntime-tensorrt",
        {"device": 1},
        [(backend.TENSORRT, {"device_id": "1"}), (backend.CUDA, {"device_id": "1", "use_tf32": "0"})],
    ),
    "tensorrt, captured": (
        "onnxruntime-tensorrt",
        {"sizes": SIZES, "cuda_graph": True},
        [
            (backend.TENSORRT, FIRST | {"trt_cuda_graph_enable": "1"}),
            (backend.CUDA, FIRST | {"use_tf32": "0"}),
        ],
    ),
}


@pytest.mark.parametrize(("name", "options", "providers"), ASKED.values(), ids=ASKED)
def test_the_provider_is_asked_for_with_its_options_and_no_fallback(
    wheel, monkeypatch, name, options, providers
):
    found = wheel()
    made = []

    def engine(kind, *given):
        made.append((kind, given[1:]))
        return types.SimpleNamespace()

    for kind in ("OnnxRuntimeEngine", "CudaGraphEngine"):
        monkeypatch.setattr(backend, kind, functools.partial(engine, kind))
    engines.open(GRAPH, name, **options)
    assert (found.asked, found.fallback) == (providers, 0)
    assert found.said == [backend.FATAL, "preload"]
    captured = any("graph" in option for _, options in providers for option in options)
    kind = "CudaGraphEngine" if captured else "OnnxRuntimeEngine"
    assert made == [(kind, ("cuda", options.get("device", 0)))]


@pytest.mark.parametrize(
    ("graph", "tf32"),
    [(GRAPH.with_name("halves.onnx"), "1"), (TINY / "denoiser.onnx", "0")],
    ids=["computed in half precision", "stored in half precision"],
)
def test_only_what_computes_in_half_precision_is_multiplied_with_its_few_bits(wheel, graph, tf32):
    found = wheel()
    backend.open(graph, provider=backend.CUDA)
    assert found.asked == [(backend.CUDA, FIRST | {"use_tf32": tf32})]


def test_a_graph_whose_constants_can_be_refitted_is_not_captured(wheel):
    found, path = wheel(), GRAPH.with_name("refittable.onnx")
    engine = backend.open(path, sizes={"rows": 2}, provider=backend.CUDA, cuda_graph=True)
    assert type(engine) is backend.OnnxRuntimeEngine and engine.weights
    assert found.asked == [(backend.CUDA, FIRST | {"use_tf32": "0"})]
    assert backend.open(path, provider=backend.TENSORRT).weights == ()


def test_a_cuda_graph_on_the_cpu_and_an_unknown_provider_are_refused():
    with pytest.raises(EngineInputError, match="cuda_graph True"):
        engines.open(GRAPH, "onnxruntime", cuda_graph=True)
    with pytest.raises(EngineInputError, match="'DmlExecutionProvider'"):
        engines.open(GRAPH, "onnxruntime", provider="DmlExecutionProvider")


def test_what_is_bound_goes_to_the_device_and_what_is_fed_does_not(monkeypatch):
    session = ort.InferenceSession(GRAPH, providers=[backend.CPU])
    uploaded = []
    value = ort.OrtValue.ortvalue_from_numpy
    stand_in = types.SimpleNamespace(
        ortvalue_from_numpy=lambda array, *device: uploaded.append((array.shape, device)) or value(array)
    )
    monkeypatch.setattr(backend, "ort", types.SimpleNamespace(**{**vars(ort), "OrtValue": stand_in}))
    engine = backend.OnnxRuntimeEngine(session, "cuda", 1)
    engine.bind({"lora": LORA, "step": STEP})
    for _ in range(3):
        np.testing.assert_array_equal(engine.run({"x": X})["y"], Y)
    assert uploaded == [((1, 2), ("cuda", 1)), ((), ("cuda", 1))]


# The bookkeeping of a CUDA graph, on ONNX Runtime's CPU


@pytest.fixture
def graph():
    """An engine with fixed buffers; `copies` are the names of those that were written to, in order."""
    options = ort.SessionOptions()
    for name, size in SIZES.items():
        options.add_free_dimension_override_by_name(name, size)
    session = ort.InferenceSession(GRAPH, options, providers=[backend.CPU])
    engine = backend.CudaGraphEngine(session, "cpu")
    engine.copies = []
    buffers = engine._input_buffers
    engine._input_buffers = {name: Watched(name, buffers[name], engine.copies) for name in buffers}
    with engine:
        yield engine


class Watched:
    """A buffer that writes down when it is written to, and can fail at it."""

    def __init__(self, name, buffer, copies):
        self.name, self.buffer, self.copies, self.broken = name, buffer, copies, False

    def update_inplace(self, array):
        if self.broken:
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")
        self.copies.append(self.name)
        self.buffer.update_inplace(array)


def copied(engine):
    names, engine.copies[:] = sorted(engine.copies), []
    return names


def test_a_run_copies_what_is_fed_and_of_what_is_bound_only_what_changed(graph):
    graph.bind({"lora": LORA, "step": STEP})
    assert copied(graph) == []
    np.testing.assert_array_equal(graph.run({"x": X})["y"], Y)
    assert copied(graph) == ["lora", "step", "x"]
    np.testing.assert_array_equal(graph.run({"x": X + 1})["y"], (X + 1) @ W + 2 * LORA)
    assert copied(graph) == ["x"]
    graph.bind({"lora": LORA + 1})
    np.testing.assert_array_equal(graph.run({"x": X})["y"], X @ W + 2 * (LORA + 1))
    assert copied(graph) == ["lora", "x"]


def test_constants_of_a_capture_cannot_be_refitted():
    options = ort.SessionOptions()
    options.add_free_dimension_override_by_name("rows", 2)
    session = ort.InferenceSession(GRAPH.with_name("refittable.onnx"), options, providers=[backend.CPU])
    with backend.CudaGraphEngine(session, "cpu") as engine, pytest.raises(EngineError, match="be refitted"):
        engine.refit({"b": np.ones((1, 2), np.float32)})


def test_an_input_that_was_fed_between_two_bindings_is_copied_again(graph):
    graph.bind({"x": X, "lora": LORA, "step": STEP})
    graph.run({})
    graph.unbind(["lora"])
    np.testing.assert_array_equal(graph.run({"lora": LORA * 0})["y"], X @ W)
    graph.bind({"lora": LORA})
    np.testing.assert_array_equal(graph.run({})["y"], Y)


def test_binding_there_and_back_gives_the_same_bits(graph):
    def run_with(seed):
        graph.bind({"lora": np.random.default_rng(seed).standard_normal((1, 2)).astype(np.float32)})
        return graph.run({"x": X, "step": STEP})["y"].tobytes()

    first, other, again = run_with(1), run_with(2), run_with(1)
    assert first == again != other


def test_what_is_bound_is_a_copy_and_results_are_the_callers(graph):
    lora = LORA.copy()
    graph.bind({"lora": lora, "step": STEP})
    lora[:] = 0
    first = graph.run({"x": X})
    second = graph.run({"x": X * 0})
    np.testing.assert_array_equal(first["y"], Y)
    np.testing.assert_array_equal(first["same"], X)
    second["y"][:] = -1
    np.testing.assert_array_equal(graph.run({"x": X})["y"], Y)


@pytest.mark.parametrize("wrong", [{"x": X[:1]}, {"lora": np.ones((2, 2), np.float32)}])
def test_another_size_than_was_captured_is_refused_before_anything_is_copied(graph, wrong):
    with pytest.raises(EngineInputError, match="the graph takes"):
        graph.run(FEEDS | wrong)
    assert copied(graph) == []


def test_a_copy_that_fails_is_an_engine_error_and_is_made_again(graph):
    graph.bind({"lora": LORA, "step": STEP})
    graph.run({"x": X})
    graph.bind({"lora": LORA + 1})
    graph._input_buffers["lora"].broken = True
    with pytest.raises(EngineError, match="illegal memory access"):
        graph.run({"x": X})
    graph._input_buffers["lora"].broken = False
    np.testing.assert_array_equal(graph.run({"x": X})["y"], X @ W + 2 * (LORA + 1))


def test_runs_take_turns_and_each_sees_one_binding_as_a_whole(graph):
    graph.bind({"step": STEP, "x": X * 0, "lora": LORA * 0})
    done = threading.Event()

    def rebind():
        for k in range(200):
            graph.bind({"x": np.full((2, 3), k, np.float32), "lora": np.full((1, 2), -k, np.float32)})
        done.set()

    def agrees(_):
        results = graph.run({})
        k = results["same"][0, 0]  # x is k and lora -k, so y is 2 k - 2 k
        return k >= 0 and not results["y"].any()

    with ThreadPoolExecutor(4) as pool:
        rebinding = pool.submit(rebind)
        while not done.wait(0.001):
            assert all(pool.map(agrees, range(3)))
        rebinding.result()


def test_closing_frees_the_buffers_and_ends_runs(graph):
    graph.bind(FEEDS)
    graph.close()
    graph.close()
    assert not graph._input_buffers and not graph._output_buffers and not graph._in_buffers
    with pytest.raises(EngineClosed):
        graph.run({})
