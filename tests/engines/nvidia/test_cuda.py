"""Several GPUs, on the stand-ins for CUDA and TensorRT: an engine works on its own, whoever calls it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hyperrt.engines import EngineError, TensorSpec, dlpack
from tests.engines import fake_cuda, fake_nvidia

PLAN = {"inputs": {"x": [2], "gain": [1]}, "outputs": {"y": [2]}, "weights": {"w": 2}}
WEIGHTS = (TensorSpec("w", (2,), "float32"),)
X, GAIN = np.array([1, 2], np.float32), np.array([10], np.float32)


@pytest.fixture
def cuda(monkeypatch):
    """A machine with two GPUs; the first is every thread's current one."""
    found, _ = fake_nvidia.install(monkeypatch)
    found.devices = 2
    return found


@pytest.fixture
def opened(cuda, tmp_path):
    """A function: number of a GPU -> engine."""
    return lambda device: fake_nvidia.open_plan(tmp_path, PLAN, weights=WEIGHTS, device=device)


def elsewhere(function, *arguments, **options):
    """A call from a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments, **options).result()


def test_an_engine_works_on_its_gpu_from_any_thread(opened, cuda):
    with opened(1) as engine:
        elsewhere(engine.bind, {"x": X, "gain": GAIN})
        elsewhere(engine.refit, {"w": X})
        for _ in range(4):
            there = elsewhere(engine.run, {}, host=False)["y"]
        assert cuda.launches == 2  # recorded, too
        assert there.__dlpack_device__() == (dlpack.CUDA, 1)
        np.testing.assert_array_equal(elsewhere(np.asarray, there), 11 * X)
        np.testing.assert_array_equal(elsewhere(there.repeat, 2), np.repeat(11 * X, 2))
        elsewhere(engine.close)
    assert [queue.device for queue in cuda.queues] == [1]


def test_engines_of_two_gpus_take_turns_in_one_thread(opened, cuda):
    with opened(0) as first, opened(1) as second:
        for engine in (first, second, first, second):
            np.testing.assert_array_equal(engine.run({"x": X, "gain": GAIN})["y"], 10 * X)
    assert [queue.device for queue in cuda.queues] == [0, 1]


def test_what_one_gpu_made_another_takes_by_way_of_the_host(opened, cuda):
    with opened(0) as first, opened(1) as second:
        here = first.run({"x": X, "gain": GAIN}, host=False)["y"]
        cuda.copies.clear()
        second.bind({"x": here})
        second.refit({"w": here})
        there = second.run({"gain": GAIN}, host=False)["y"]
        both = dlpack.concatenate([there, here])
        assert both.__dlpack_device__() == (dlpack.CUDA, 1)
        np.testing.assert_array_equal(np.asarray(both), np.concatenate([110 * X, 10 * X]))
        assert [kind for kind, _ in cuda.copies].count("down") == 4  # three times `here`, and the result


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(opened, monkeypatch, tmp_path):
    fake_cuda.install(monkeypatch, tmp_path, fake_cuda.H100, fake_cuda.H100)
    with pytest.raises(EngineError, match=r"no NVIDIA GPU 2\n.*sees 2 of them: 0, 1\n.*CUDA_VISIBLE"):
        opened(2)
