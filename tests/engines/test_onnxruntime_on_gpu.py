"""ONNX Runtime on the NVIDIA GPU of this machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from hyperrt import engines
from tests.backends import FEEDS, LORA, STEP, W, X

ort = pytest.importorskip("onnxruntime")
backend = pytest.importorskip("hyperrt.engines.onnxruntime")
GRAPH = Path(__file__).parent / "graphs" / "affine.onnx"
SIZES = {"rows": 2, "subjects": 1}


@pytest.fixture(params=["onnxruntime-cuda", "onnxruntime-tensorrt"])
def on_gpu(request):
    if backend.CUDA not in ort.get_available_providers():
        pytest.skip("this is not the package for GPUs")
    if request.param == "onnxruntime-tensorrt" and find_spec("tensorrt") is None:
        pytest.skip("TensorRT's libraries are not installed")
    return request.param


@pytest.mark.gpu
def test_a_captured_graph_computes_what_a_plain_one_does(on_gpu):
    with (
        engines.open(GRAPH, on_gpu, sizes=SIZES) as plain,
        engines.open(GRAPH, on_gpu, sizes=SIZES, cuda_graph=True) as captured,
    ):
        assert isinstance(captured, backend.CudaGraphEngine)
        for k in range(4):  # the first run captures, the others replay
            feeds = FEEDS | {"x": X + k, "lora": LORA * k}
            expected = plain.run(feeds)
            for name, found in captured.run(feeds).items():
                np.testing.assert_array_equal(found, expected[name])


@pytest.mark.gpu
def test_a_captured_graph_sees_another_binding(on_gpu):
    with engines.open(GRAPH, on_gpu, sizes=SIZES, cuda_graph=True) as engine:
        engine.bind({"x": X, "step": STEP})
        for lora in (LORA, LORA * 0, LORA):
            engine.bind({"lora": lora})
            np.testing.assert_array_equal(engine.run({})["y"], X @ W + 2 * lora)
