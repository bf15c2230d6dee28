"""What every backend promises, on a graph of tests/backends.py: y = x w + step lora, same = x."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.engines import EngineClosed, EngineError, EngineInputError, EngineLoadError, TensorSpec
from tests.backends import FEEDS, FILES, LORA, STEP, W, X, Y, marked, opened, ready


@pytest.fixture(params=map(marked, FILES))
def backend(request, monkeypatch):
    return ready(request.param, monkeypatch)


@pytest.fixture
def engine(backend):
    with opened(backend, threads=1) as engine:
        yield engine


def no_run(*_):
    raise AssertionError("the backend was called")


def test_specs_name_every_input_and_output_with_shape_and_type(engine):
    assert engine.inputs == (
        TensorSpec("x", ("rows", 3), "float32"),
        TensorSpec("lora", ("subjects", 2), "float32"),
        TensorSpec("step", (), "int64"),
    )
    assert engine.outputs == (
        TensorSpec("y", ("rows", 2), "float32"),
        TensorSpec("same", ("rows", 3), "float32"),
    )


def test_run_returns_every_output_by_name(engine):
    results = engine.run(FEEDS)
    assert list(results) == ["y", "same"]
    np.testing.assert_array_equal(results["y"], Y)
    assert results["y"].dtype == np.float32


def test_a_named_size_may_be_anything_and_change_between_runs(engine):
    for rows in (1, 5, 2):
        assert engine.run(FEEDS | {"x": np.ones((rows, 3), np.float32)})["y"].shape == (rows, 2)


WRONG = {
    "missing": ({"x": X, "lora": LORA}, "input 'step' is missing"),
    "unknown, with the nearest name": (FEEDS | {"lara": LORA}, r"no input 'lara'\n.*x\n.*mean 'lora'\?"),
    "wrong size": (FEEDS | {"x": X[:, :2]}, r"'x' has shape \[2, 2\]\n.*takes \[rows, 3\]"),
    "wrong rank": (FEEDS | {"lora": LORA[0]}, r"'lora' has shape \[2\]\n.*takes \[subjects, 2\]"),
    "scalar with an axis": (FEEDS | {"step": STEP[None]}, r"'step' has shape \[1\]\n.*takes \[\]"),
    "wrong type": (FEEDS | {"x": X.astype(np.float64)}, r"'x' is float64\n.*takes float32"),
    "wrong byte order": (FEEDS | {"x": X.astype(">f4")}, r"'x' is >f4\n.*takes float32"),
    "list": (FEEDS | {"x": X.tolist()}, "'x' is a list"),
    "number": (FEEDS | {"step": 2}, "'step' is a int"),
    "None": (FEEDS | {"lora": None}, "'lora' is a NoneType"),
}


@pytest.mark.parametrize(("feeds", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_feed_is_refused_before_anything_runs(engine, monkeypatch, feeds, message):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_run", no_run)
        with pytest.raises(EngineInputError, match=message):
            engine.run(feeds)
    np.testing.assert_array_equal(engine.run(FEEDS)["y"], Y)


LAYOUTS = {
    "every other row": np.repeat(X, 2, axis=0)[::2],
    "Fortran order": np.asfortranarray(X),
    "read-only": np.frombuffer(X.tobytes(), np.float32).reshape(2, 3),
    "broadcast": np.broadcast_to(X[:1], (2, 3)),
    "not aligned": np.frombuffer(b"\0" + X.tobytes(), np.uint8)[1:].view(np.float32).reshape(2, 3),
}


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
def test_how_an_array_lies_in_memory_does_not_matter(engine, x):
    np.testing.assert_array_equal(engine.run(FEEDS | {"x": x})["y"], x @ W + 2 * LORA)
    engine.bind({"x": x})
    np.testing.assert_array_equal(engine.run({"lora": LORA, "step": STEP})["y"], x @ W + 2 * LORA)


def test_a_numpy_number_is_a_scalar(engine):
    np.testing.assert_array_equal(engine.run(FEEDS | {"step": np.int64(2)})["y"], Y)


def test_results_belong_to_the_caller(engine):
    x = X.copy()
    engine.bind({"lora": LORA, "step": STEP})
    first = engine.run({"x": x})
    x[:] = 0
    second = engine.run({"x": X})
    engine.close()
    np.testing.assert_array_equal(first["same"], X)  # not the array that was fed
    for result in first.values():
        result[:] = -1  # can be written to, and reaches nobody
    np.testing.assert_array_equal(second["y"], Y)


def test_a_bound_input_is_not_fed_again(engine):
    engine.bind({"lora": LORA, "step": STEP})
    np.testing.assert_array_equal(engine.run({"x": X})["y"], Y)
    np.testing.assert_array_equal(engine.run({"x": X + 1})["y"], (X + 1) @ W + 2 * LORA)
    with pytest.raises(EngineInputError, match="'lora' is bound already"):
        engine.run({"x": X, "lora": LORA})


def test_all_inputs_can_be_bound(engine):
    engine.bind(FEEDS)
    np.testing.assert_array_equal(engine.run({})["y"], Y)


def test_what_is_bound_is_a_copy(engine):
    lora = LORA.copy()
    engine.bind({"lora": lora})
    lora[:] = 0
    np.testing.assert_array_equal(engine.run({"x": X, "step": STEP})["y"], Y)


def test_what_is_lent_may_be_written_to_and_bound_again(engine):
    lora = np.zeros_like(LORA)
    engine.bind({"lora": lora, "step": STEP}, copy=False)
    np.testing.assert_array_equal(engine.run({"x": X})["y"], X @ W)
    lora[:] = LORA
    engine.bind({"lora": lora}, copy=False)
    del lora  # the engine keeps what it reads
    np.testing.assert_array_equal(engine.run({"x": X})["y"], Y)


def test_binding_again_replaces_also_by_another_size(engine):
    engine.bind({"lora": LORA, "step": STEP})
    per_row = np.array([[1, 2], [3, 4]], np.float32)
    engine.bind({"lora": per_row})
    np.testing.assert_array_equal(engine.run({"x": X})["y"], X @ W + 2 * per_row)


def test_binding_there_and_back_gives_the_same_bits(engine):
    def run_with(seed):
        engine.bind({"lora": np.random.default_rng(seed).standard_normal((1, 2)).astype(np.float32)})
        return engine.run({"x": X, "step": STEP})["y"].tobytes()

    first, other, again = run_with(1), run_with(2), run_with(1)
    assert first == again != other


@pytest.mark.parametrize(
    "wrong", [{"y": X}, {"step": STEP[None]}, {"step": 2}], ids=["name", "shape", "list"]
)
def test_a_bind_that_fails_changes_nothing(engine, wrong):
    engine.bind({"lora": LORA})
    with pytest.raises(EngineInputError):
        engine.bind({"lora": LORA + 1} | wrong)
    np.testing.assert_array_equal(engine.run({"x": X, "step": STEP})["y"], Y)


def test_binding_nothing_does_nothing(engine):
    engine.bind({"lora": LORA})
    engine.bind({})
    np.testing.assert_array_equal(engine.run({"x": X, "step": STEP})["y"], Y)


def test_an_input_that_was_unbound_is_fed_again(engine):
    engine.bind({"lora": LORA, "step": STEP})
    engine.unbind(["lora"])
    with pytest.raises(EngineInputError, match="'lora' is missing"):
        engine.run({"x": X})
    np.testing.assert_array_equal(engine.run({"x": X, "lora": LORA})["y"], Y)


def test_unbinding_what_is_not_bound_is_refused_and_frees_nothing(engine):
    engine.bind({"lora": LORA})
    with pytest.raises(EngineInputError, match=r"'step' is not bound\n.*inputs are bound: lora"):
        engine.unbind(["lora", "step"])
    np.testing.assert_array_equal(engine.run({"x": X, "step": STEP})["y"], Y)


def test_a_graph_with_no_replaceable_constants_cannot_be_refitted(engine):
    assert engine.weights == ()
    with pytest.raises(EngineError, match="cannot be refitted"):
        engine.refit({"w": W})


def test_closing_twice_is_fine_and_a_with_statement_closes(backend):
    with opened(backend) as engine:
        engine.close()
    engine.close()


USES = {
    "run": lambda engine: engine.run(FEEDS),
    "bind": lambda engine: engine.bind({"lora": LORA}),
    "unbind": lambda engine: engine.unbind([]),
    "refit": lambda engine: engine.refit({}),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_closed_engine_refuses_to_work(engine, use):
    engine.close()
    with pytest.raises(EngineClosed, match="the engine is closed"):
        use(engine)


def test_threads_that_run_at_once_get_their_own_results(engine):
    engine.bind({"lora": LORA, "step": STEP})

    def alone(k):
        x = np.full((k + 1, 3), k, np.float32)
        return all(np.array_equal(engine.run({"x": x})["y"], x @ W + 2 * LORA) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(alone, range(8)))


def test_a_run_sees_one_binding_as_a_whole(engine):
    engine.bind({"x": X * 0, "lora": LORA * 0, "step": STEP})
    done = threading.Event()

    def rebind():
        for k in range(200):
            engine.bind({"x": np.full((2, 3), k, np.float32), "lora": np.full((1, 2), -k, np.float32)})
        done.set()

    with ThreadPoolExecutor(1) as pool:
        rebinding = pool.submit(rebind)
        while not done.wait(0.0001) and not rebinding.done():
            results = engine.run({})
            k = results["same"][0, 0]  # x is k and lora -k, so y is 2 k - 2 k
            np.testing.assert_array_equal(results["y"], np.zeros((2, 2)), err_msg=f"at {k}")
        rebinding.result()


def test_closing_during_runs_ends_them_with_a_result_or_a_closed_engine(engine):
    def until_closed(_):
        try:
            while True:
                np.testing.assert_array_equal(engine.run(FEEDS)["y"], Y)
        except EngineClosed:
            return True

    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(until_closed, range(4))
        engine.run(FEEDS)
        engine.close()
        assert all(runs)


def test_what_is_not_a_graph_is_refused_by_name(backend, tmp_path):
    for content in (b"", b"not a graph", b"\x80\x00\xff" * 99, b"{}", b"[1]", b'{"inputs": 3}'):
        (tmp_path / "graph").write_bytes(content)
        with pytest.raises(EngineLoadError, match=r"cannot open the graph .*graph\n  why: .+\n  do:  "):
            engines.open(tmp_path / "graph", backend)


def test_a_missing_file_and_a_folder_are_refused(backend, tmp_path):
    with pytest.raises(EngineLoadError, match="there is no such file"):
        engines.open(tmp_path / "graph", backend)
    with pytest.raises(EngineLoadError, match="not a regular file"):
        engines.open(tmp_path, backend)


@pytest.mark.parametrize("threads", [None, 1, 2, 10**9])
def test_any_number_of_threads_gives_the_same_result(backend, threads):
    with opened(backend, threads=threads) as engine:
        np.testing.assert_array_equal(engine.run(FEEDS)["y"], Y)


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(backend, threads):
    with pytest.raises(EngineInputError, match=f"threads is {threads}"):
        opened(backend, threads=threads)


@pytest.mark.parametrize("sizes", [{"rows": 2}, {"subjects": 1}, {"rows": 2, "subjects": 1, "absent": 7}])
def test_a_size_that_is_given_is_fixed_and_the_others_stay_free(backend, sizes):
    with opened(backend, threads=1, sizes=sizes) as engine:
        rows, subjects = (sizes.get(name, name) for name in ("rows", "subjects"))
        assert [spec.shape for spec in engine.inputs] == [(rows, 3), (subjects, 2), ()]
        assert [spec.shape for spec in engine.outputs] == [(rows, 2), (rows, 3)]
        np.testing.assert_array_equal(engine.run(FEEDS)["y"], Y)
        if "rows" in sizes:
            with pytest.raises(EngineInputError, match=r"\[3, 3\]\n.*takes \[2, 3\]"):
                engine.run(FEEDS | {"x": np.ones((3, 3), np.float32)})


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_less_than_one_is_refused(backend, size):
    with pytest.raises(EngineInputError, match=f"'rows' is {size}"):
        opened(backend, sizes={"rows": size})
