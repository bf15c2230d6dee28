"""What the TensorRT backends do with a plan, on stand-ins for CUDA and TensorRT: no GPU is needed."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.engines import (
    EngineError,
    EngineLoadError,
    EngineMemoryError,
    EngineUnusable,
    TensorSpec,
    dlpack,
)
from hyperrt.engines.fake import FakeEngine
from tests.engines import fake_cuda, fake_nvidia

FIXED = {"inputs": {"x": [2], "gain": [1]}, "outputs": {"y": [2]}}
WEIGHTS = (TensorSpec("w", (1, 2), "float32"), TensorSpec("v", (2,), "float32"))
REFITTABLE = {**FIXED, "weights": {"w": 2, "v": 2}}
OPEN = {"inputs": {"x": [-1], "gain": [1]}, "outputs": {"y": [-1]}}
MEMORY_SAID = ("Cuda Runtime (out of memory)", "OutOfMemory (Requested 9 bytes could not be allocated)")
X, GAIN = np.array([1, 2], np.float32), np.array([10], np.float32)


@pytest.fixture
def nvidia(monkeypatch):
    """The two stand-ins."""
    return fake_nvidia.install(monkeypatch)


@pytest.fixture
def opened(nvidia, tmp_path):
    """A function: plan -> engine."""
    return functools.partial(fake_nvidia.open_plan, tmp_path)


def test_a_plan_runs_and_its_results_belong_to_the_caller(opened):
    with opened(FIXED) as engine:
        assert engine.inputs == (TensorSpec("x", (2,), "float32"), TensorSpec("gain", (1,), "float32"))
        first = engine.run({"x": X, "gain": GAIN})["y"]
        engine.run({"x": 0 * X, "gain": GAIN})
        np.testing.assert_array_equal(first, [10, 20])


def test_a_loop_on_the_device_never_waits(opened, nvidia):
    cuda, _ = nvidia
    with opened(FIXED) as engine:
        engine.bind({"gain": GAIN})
        x = X
        before = cuda.waits
        steps = [x := engine.run({"x": x}, host=False)["y"] for _ in range(5)]
        assert cuda.waits == before
        np.testing.assert_array_equal(steps[0], 10 * X)  # not what the steps after it wrote
        np.testing.assert_array_equal(np.asarray(x), 1e5 * X)


@pytest.mark.parametrize("ahead", ["the first", "the second"])
def test_what_one_engine_made_another_takes_without_the_host(opened, nvidia, ahead):
    """Each has a stream of its own, and what the first made is freed as soon as the second was told of it."""
    cuda, _ = nvidia
    with opened(FIXED) as first, opened(OPEN) as second:
        for k in range(1, 4):
            made = first.run({"x": k * X, "gain": GAIN}, host=False)
            cuda.copies.clear()
            second.bind({"x": made.pop("y")})
            if ahead == "the first":  # it would free what the second has not read
                cuda.cudaStreamSynchronize(first._stream.handle)
            result = second.run({"gain": GAIN}, host=False)["y"]
            assert {kind for kind, size in cuda.copies if size == 8} == {"there"}
            np.testing.assert_array_equal(result, 100 * k * X)


def test_parts_of_a_result_are_views_and_can_be_put_together_again(opened, nvidia):
    with opened(OPEN) as engine:
        x = np.arange(6, dtype=np.float32)
        row = engine.run({"x": x, "gain": GAIN}, host=False)["y"].reshape((3, 2))
        part = row[1:]
        del row
        np.testing.assert_array_equal(part, [[20, 30], [40, 50]])
        np.testing.assert_array_equal(part[1:2][0:1], [[40, 50]])
        np.testing.assert_array_equal(part.repeat(2, 0), np.repeat([[20, 30], [40, 50]], 2, 0))
        mixed = dlpack.concatenate([np.zeros((1, 2), np.float32), part, part[:1]])
        np.testing.assert_array_equal(mixed, [[0, 0], [20, 30], [40, 50], [20, 30]])
        assert dlpack.concatenate([part]) is part
        here = pickle.loads(pickle.dumps(part))
        assert isinstance(here, np.ndarray) and np.array_equal(here, part)
    nvidia[0].cudaDeviceSynchronize()
    np.testing.assert_array_equal(part, [[20, 30], [40, 50]])  # longer than the engine


def test_an_array_on_the_device_is_fed_to_an_engine_on_the_host(opened, tmp_path):
    with opened(FIXED) as engine:
        there = engine.run({"x": X, "gain": GAIN}, host=False)["y"]
    host = FakeEngine(lambda t: {"y": 2 * t["x"]}, engine.inputs[:1], engine.outputs)
    np.testing.assert_array_equal(host.run({"x": there})["y"], 20 * X)
    host.bind({"x": there})
    np.testing.assert_array_equal(host.run({})["y"], 20 * X)


def test_a_recorded_step_is_right_for_the_next_subject_too(opened, nvidia):
    cuda, trt = nvidia
    with opened(FIXED) as engine:
        engine.bind({"gain": GAIN})
        for _ in range(4):
            engine.run({"x": X})
        assert cuda.launches == 2  # after two runs that warm up
        places = len(trt.addresses)
        engine.bind({"gain": 2 * GAIN})
        np.testing.assert_array_equal(engine.run({"x": X})["y"], 20 * X)
        engine.bind({"gain": GAIN})
        np.testing.assert_array_equal(engine.run({"x": X})["y"], 10 * X)
        assert cuda.launches == 4 and len(trt.addresses) == places


def test_a_step_that_cannot_be_recorded_runs_all_the_same(opened, nvidia):
    cuda, trt = nvidia
    trt.fail.add("record")
    with opened(FIXED) as engine:
        for _ in range(4):
            np.testing.assert_array_equal(engine.run({"x": X, "gain": GAIN})["y"], 10 * X)
    assert cuda.launches == 0


def test_open_sizes_are_those_of_the_call(opened, nvidia):
    with opened(OPEN) as engine:
        assert engine.inputs[0].shape == ("x_0",)
        for count in (2, 5, 2):
            x = np.arange(count, dtype=np.float32)
            np.testing.assert_array_equal(engine.run({"x": x, "gain": GAIN})["y"], 10 * x)
        with pytest.raises(EngineError, match=r"does not accept 'x' of shape \[9\](?s:.*)not in the profile"):
            engine.run({"x": np.zeros(9, np.float32), "gain": GAIN})
    assert nvidia[0].launches == 0


def test_subjects_come_and_go_by_refit(opened):
    a, b, zero = (np.full((1, 2), k, np.float32) for k in (3, 4, 0))
    with opened(REFITTABLE, weights=WEIGHTS) as engine:
        feeds = {"x": X, "gain": GAIN}
        base = engine.run(feeds)["y"]
        found = []
        for weight in (a, b, a, zero):
            engine.refit({"w": weight})
            found.append(engine.run(feeds)["y"])
        np.testing.assert_array_equal(found, [base + 3, base + 4, base + 3, base])


def test_a_refit_reads_weights_on_the_device_and_goes_back_to_them(opened, nvidia):
    cuda, trt = nvidia
    feeds = {"x": X, "gain": GAIN}
    with opened(FIXED) as decoder, opened(REFITTABLE, weights=WEIGHTS) as engine:
        subjects = [decoder.run({"x": k * X, "gain": GAIN}, host=False)["y"] for k in (1, 2)]
        cuda.copies.clear()
        engine.refit({"w": subjects[0].reshape((1, 2)), "v": subjects[0]})
        cuda.cudaDeviceSynchronize()
        assert cuda.copies == [("there", 8)] * 2
        np.testing.assert_array_equal(engine.run(feeds)["y"], 30 * X)
        really, calls = engine._weights._refitter.refit_cuda_engine_async, []
        trt.refit_stops, trt.says = 1, MEMORY_SAID[0]

        def stops_once(stream):
            done = really(stream)
            trt.refit_stops = None
            calls.append(done)
            return done

        engine._weights._refitter.refit_cuda_engine_async = stops_once
        with pytest.raises(EngineMemoryError, match="refitting the graph failed"):
            engine.refit({"w": subjects[1].reshape((1, 2)), "v": subjects[1]})
        assert calls == [False, True]
        np.testing.assert_array_equal(engine.run(feeds)["y"], 30 * X)


def test_weights_that_a_refit_leaves_out_are_as_they_were(opened):
    with opened(REFITTABLE, weights=WEIGHTS) as engine:
        engine.refit({"v": np.ones(2, np.float32)})
        engine.refit({"w": np.full((1, 2), 3, np.float32)})
        np.testing.assert_array_equal(engine.run({"x": X, "gain": GAIN})["y"], 10 * X + 4)


def test_a_step_is_recorded_again_after_a_refit(opened, nvidia):
    cuda, _ = nvidia
    with opened(REFITTABLE, weights=WEIGHTS) as engine:
        for _ in range(4):
            engine.run({"x": X, "gain": GAIN})
        first = engine._captured
        engine.refit({"w": np.full((1, 2), 3, np.float32)})
        np.testing.assert_array_equal(engine.run({"x": X, "gain": GAIN})["y"], 10 * X + 3)
        assert cuda.launches == 3 and engine._captured is not first


def test_a_refit_that_stops_half_way_leaves_the_old_weights(opened, nvidia):
    _, trt = nvidia
    with opened(REFITTABLE, weights=WEIGHTS) as engine:
        old = {"w": np.ones((1, 2), np.float32), "v": np.ones(2, np.float32)}
        engine.refit(old)
        expected = engine.run({"x": X, "gain": GAIN})["y"]

        trt.refit_stops = 1
        with pytest.raises(EngineUnusable):  # nor could the old ones be written
            engine.refit({name: 5 * weight for name, weight in old.items()})
        with pytest.raises(EngineUnusable):
            engine.run({"x": X, "gain": GAIN})
        trt.refit_stops = None
        engine.refit(old)
        np.testing.assert_array_equal(engine.run({"x": X, "gain": GAIN})["y"], expected)


def test_a_plan_with_other_weights_than_the_bundle_is_refused(opened):
    with pytest.raises(EngineLoadError, match=r"another graph(?s:.*)differ in 1 weights, such as 'v'"):
        opened(REFITTABLE, weights=WEIGHTS[:1])
    with pytest.raises(EngineLoadError, match=r"does not fit(?s:.*)2 float32 numbers, the bundle 3"):
        opened(REFITTABLE, weights=(TensorSpec("w", (3,), "float32"), WEIGHTS[1]))


def test_weights_that_were_folded_into_others_are_refused(opened, nvidia):
    nvidia[1].fail.add("missing")
    with pytest.raises(EngineLoadError, match="'folded'"):
        opened(REFITTABLE, weights=WEIGHTS)


def test_a_plan_that_does_not_load_says_what_tensorrt_says(opened):
    with pytest.raises(EngineLoadError, match=r"does not load(?s:.*)240 vs 239\n(?s:.*)hyperrt compile"):
        opened(b"another version")


def test_a_gpu_that_tensorrt_does_not_support_is_for_another_backend(opened, nvidia):
    nvidia[1].says = "TensorRT-RTX does not support this compute capability, so the engine cannot be rebuilt."
    nvidia[1].fail.add("deserialize")
    with pytest.raises(EngineError, match=r"compute capability(?s:.*)--backend onnxruntime-cuda") as caught:
        opened(FIXED)
    assert caught.value.code == 7  # not of the plan: another one would not help


def test_no_plan_is_said_with_the_command_that_makes_one(nvidia, tmp_path):
    (tmp_path / "graph.onnx").write_bytes(b"onnx")
    with pytest.raises(EngineLoadError, match="hyperrt compile"):
        engines.open(tmp_path / "graph.onnx", "tensorrt")


def test_a_full_gpu_is_an_error_of_memory_with_both_sides(opened, nvidia):
    nvidia[1].fail.add("context")
    with pytest.raises(EngineMemoryError, match=r"out of memory(?s:.*)takes 9 MB, 5 MB are free"):
        opened(FIXED)


@pytest.mark.parametrize("says", MEMORY_SAID)
@pytest.mark.parametrize("when", ["deserialize", "execute", "refit"])
def test_memory_that_runs_out_inside_tensorrt_is_an_error_of_memory(opened, nvidia, when, says):
    _, trt = nvidia
    trt.says, feeds = says, {"x": X, "gain": GAIN}
    if when == "deserialize":
        trt.fail.add(when)
        with pytest.raises(EngineMemoryError, match="does not load the plan"):
            opened(FIXED)
        return
    with opened(REFITTABLE, weights=WEIGHTS) as engine:
        if when == "execute":
            trt.fail.add(when)
            with pytest.raises(EngineMemoryError, match="running the graph failed"):
                engine.run(feeds)
            trt.fail.clear()
        else:
            trt.refit_stops = 0
            with pytest.raises(EngineUnusable) as raised:  # nor can the old ones be written
                engine.refit({"w": np.ones((1, 2), np.float32)})
            assert isinstance(raised.value.__cause__, EngineMemoryError)
            trt.refit_stops = None
            engine.refit({"w": np.zeros((1, 2), np.float32)})
        np.testing.assert_array_equal(engine.run(feeds)["y"], 10 * X)


def test_memory_that_runs_out_in_a_step_leaves_the_engine_as_it_was(opened, nvidia):
    cuda, _ = nvidia
    with opened(FIXED) as engine:
        engine.bind({"gain": GAIN})
        expected = engine.run({"x": X})["y"]
        for _ in range(3):
            room, cuda.room = cuda.room, 0
            with pytest.raises(EngineMemoryError, match="running the graph failed"):
                engine.run({"x": X}, host=False)  # results have memory of their own
            cuda.room = room
            np.testing.assert_array_equal(engine.run({"x": X})["y"], expected)


def test_binding_when_memory_is_out_keeps_what_was_bound(opened, nvidia):
    cuda, _ = nvidia
    with opened(OPEN) as engine:
        engine.bind({"gain": GAIN, "x": X})
        expected = engine.run({})["y"]
        cuda.room = 0
        with pytest.raises(EngineMemoryError, match="binding an input failed"):
            engine.bind({"gain": 5 * GAIN, "x": np.zeros(7, np.float32)})
        np.testing.assert_array_equal(engine.run({})["y"], expected)


@pytest.mark.parametrize(("room", "size"), [(1, 7), (9, 9)], ids=["memory", "profile"])
def test_a_bind_that_fails_half_way_keeps_what_was_bound(opened, nvidia, room, size):
    """The first tensor has its new place already when the second one cannot have any."""
    cuda, _ = nvidia
    plan = {"inputs": {"x": [-1], "gain": [-1]}, "outputs": {"y": [-1]}}
    with opened(plan) as engine:
        engine.bind({"gain": GAIN, "x": X})
        expected = engine.run({})["y"]
        cuda.room = room
        with pytest.raises(EngineError):
            engine.bind({"gain": np.full(7, 3, np.float32), "x": np.zeros(size, np.float32)})
        np.testing.assert_array_equal(engine.run({})["y"], expected)


def test_a_run_that_fails_says_why(opened, nvidia):
    nvidia[1].fail.add("execute")
    with opened(FIXED) as engine, pytest.raises(EngineError, match="an illegal memory access"):
        engine.run({"x": X, "gain": GAIN})


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (None, "there is no NVIDIA driver"), ({}, "no NVIDIA GPU is visible"),
        ({"gpus": [fake_cuda.H100]}, "no NVIDIA GPU can be used\n.*no CUDA-capable device.*\n.*doctor"),
    ],
)  # fmt: skip
def test_without_a_gpu_the_error_is_one_of_the_device(opened, nvidia, monkeypatch, tmp_path, driver, said):
    nvidia[0].no_gpu = fake_nvidia.Code.cudaErrorNoDevice
    if driver is None:
        fake_cuda.uninstall(monkeypatch)
    else:
        fake_cuda.install(monkeypatch, tmp_path, *driver.get("gpus", []))
    with pytest.raises(EngineError, match=said) as raised:
        opened(FIXED)
    assert raised.value.code == 7


def test_results_on_the_device_are_taken_by_dlpack_and_freed(opened, nvidia, monkeypatch):
    from hyperrt.engines.nvidia import cuda

    monkeypatch.setattr(cuda.Buffer, "__dlpack_device__", lambda self: (dlpack.CPU, 0))
    with opened(FIXED) as engine:
        result = engine.run({"x": X, "gain": GAIN}, host=False)["y"]
        shared = np.from_dlpack(result)
        assert shared.ctypes.data == result.pointer
        np.testing.assert_array_equal(shared, 10 * X)
        pointer = result.pointer
        del result
        assert pointer in nvidia[0].memory  # for as long as the reader has it
        del shared
        nvidia[0].cudaDeviceSynchronize()
        assert pointer not in nvidia[0].memory
        unread = engine.run({"x": X, "gain": GAIN}, host=False)["y"]
        pointer, capsule = unread.pointer, unread.__dlpack__()
        del unread, capsule
        nvidia[0].cudaDeviceSynchronize()
        assert pointer not in nvidia[0].memory
