"""What every backend promises of a refit, on a graph of tests/backends.py: y = x w + b."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.engines import EngineError, EngineInputError
from tests.backends import FILES, REFITTABLE, WEIGHTS, X, marked, opened, ready

FIRST = {"w": np.ones((3, 2), np.float32), "b": np.zeros((1, 2), np.float32)}
A, B = (
    {spec.name: np.random.default_rng(seed).standard_normal(spec.shape, np.float32) for spec in WEIGHTS}
    for seed in (1, 2)
)


def computed(weights):
    return X @ weights["w"] + weights["b"]


@pytest.fixture(params=[marked(name) for name in FILES if engines.BACKENDS[name].refits])
def refitted(request, monkeypatch):
    """An engine of this graph."""
    backend = ready(request.param, monkeypatch)
    with opened(backend, REFITTABLE, threads=1) as engine:
        yield engine


def y(engine):
    return engine.run({"x": X})["y"]


@pytest.mark.parametrize("backend", [marked(name) for name in FILES if not engines.BACKENDS[name].refits])
def test_a_backend_that_cannot_refit_says_so_and_runs_with_what_the_graph_has(backend, monkeypatch):
    ready(backend, monkeypatch)
    with opened(backend, REFITTABLE, threads=1) as engine:
        assert engine.weights == ()
        np.testing.assert_allclose(y(engine), computed(FIRST), rtol=1e-2)
        with pytest.raises(EngineError, match=r"cannot be refitted\n  why: .*\n  do:  .*inputs"):
            engine.refit(A)


def test_what_can_be_refitted_is_no_input_and_has_the_value_of_the_graph(refitted):
    assert refitted.weights == WEIGHTS
    assert [spec.name for spec in refitted.inputs] == ["x"]
    np.testing.assert_allclose(y(refitted), computed(FIRST), rtol=1e-6)


def test_a_refit_replaces_all_constants_or_some(refitted):
    refitted.refit(A)
    np.testing.assert_allclose(y(refitted), computed(A), rtol=1e-5)
    refitted.refit({"b": B["b"]})
    np.testing.assert_allclose(y(refitted), computed(A | {"b": B["b"]}), rtol=1e-5)
    refitted.refit({})
    np.testing.assert_allclose(y(refitted), computed(A | {"b": B["b"]}), rtol=1e-5)


def test_refitting_there_and_back_gives_the_same_bits(refitted):
    def run_with(weights):
        refitted.refit(weights)
        return y(refitted).tobytes()

    base = y(refitted).tobytes()
    a, b, again, back = (run_with(weights) for weights in (A, B, A, FIRST))
    assert a == again != b
    assert base == back


def test_what_was_refitted_is_a_copy(refitted):
    weights = {name: array.copy() for name, array in A.items()}
    refitted.refit(weights)
    before = y(refitted)
    for array in weights.values():
        array[:] = 0
    np.testing.assert_array_equal(y(refitted), before)


@pytest.mark.parametrize(
    "wrong", [{"x": X}, {"b": B["b"][0]}, {"b": B["b"].astype(float)}, {"b": [[1, 2]]}],
    ids=["name", "shape", "type", "list"],
)  # fmt: skip
def test_a_refit_that_is_refused_changes_nothing(refitted, wrong):
    refitted.refit(A)
    before = y(refitted)
    with pytest.raises(EngineInputError, match="weight"):
        refitted.refit(B | wrong)
    np.testing.assert_array_equal(y(refitted), before)


def test_a_refit_leaves_what_is_bound(refitted):
    refitted.bind({"x": X})
    refitted.refit(A)
    np.testing.assert_allclose(refitted.run({})["y"], computed(A), rtol=1e-5)


def test_a_run_sees_one_refit_as_a_whole(refitted):
    x, ones, shift = np.ones((1, 3), np.float32), FIRST["w"], np.ones((1, 2), np.float32)
    done = threading.Event()

    def refit():
        for k in range(200):
            refitted.refit({"w": k * ones, "b": -3 * k * shift})  # y = 3 k - 3 k
        done.set()

    refitted.refit({"w": 0 * ones})
    with ThreadPoolExecutor(1) as pool:
        refitting = pool.submit(refit)
        while not done.wait(0.0001) and not refitting.done():
            np.testing.assert_array_equal(refitted.run({"x": x})["y"], np.zeros((1, 2)))
        refitting.result()
