"""What only the ONNX Runtime backend does: external data, its errors as ours, silence on stderr."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.engines import EngineError, EngineLoadError, EngineMemoryError, memory

pytest.importorskip("onnxruntime")
HERE = Path(__file__).parent / "graphs"
VECTOR = np.arange(4, dtype=np.float32)


@pytest.fixture(scope="module")
def onnx():
    return pytest.importorskip("onnx")


@pytest.fixture
def save(onnx, tmp_path):
    """save(nodes, inputs, outputs, constants) writes a model, a tensor being (name, type, shape)."""

    def saved(nodes, inputs, outputs, constants=(), opsets=(("", 20),)):
        make = onnx.helper
        sides = [[make.make_tensor_value_info(*tensor) for tensor in side] for side in (inputs, outputs)]
        nodes = [make.make_node(*node[:3], **(node[3] if node[3:] else {})) for node in nodes]
        graph = make.make_graph(nodes, "graph", *sides, list(constants))
        model = make.make_model(graph, ir_version=10, opset_imports=[make.make_opsetid(*o) for o in opsets])
        (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "graph.onnx"

    return saved


@pytest.fixture
def with_data(onnx, save):
    """with_data(location) writes y = x + w, w being four numbers in a file at `location`."""

    def saved(location, **where):
        w = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {"location": location, **where}.items():
            w.external_data.add(key=key, value=str(value))
        return save([("Add", ["x", "w"], ["y"])], [("x", 1, [4])], [("y", 1, [4])], [w])

    return saved


def test_the_stored_graphs_are_what_their_script_writes(onnx):
    graphs = runpy.run_path(str(HERE / "make.py"))["GRAPHS"]
    for name, build in graphs.items():
        assert onnx.load(HERE / name) == build()


def test_external_data_is_read_from_beside_the_graph(with_data, tmp_path, monkeypatch):
    path = with_data("weights.data")
    (tmp_path / "weights.data").write_bytes(VECTOR.tobytes())
    monkeypatch.chdir("/")
    with engines.open(path) as engine:
        np.testing.assert_array_equal(engine.run({"x": VECTOR})["y"], 2 * VECTOR)


BAD_DATA = {
    "missing": {"location": "gone"},
    "short": {"location": "short"},
    "beyond the end": {"location": "inside", "offset": 2**62},
    "before the start": {"location": "inside", "offset": -8},
    "longer than the tensor": {"location": "inside", "length": 2**62},
    "outside the folder": {"location": "../outside"},
    "absolute": {"location": "/dev/zero"},
    "a link that leaves the folder": {"location": "link"},
    "a pipe": {"location": "pipe"},
    "an address in memory": {"location": "*/_ORT_MEM_ADDR_/*", "offset": 4096, "length": 16},
}


@pytest.mark.parametrize("where", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_external_data_is_refused(with_data, tmp_path, where):
    (tmp_path / "inside").write_bytes(VECTOR.tobytes())
    (tmp_path / "short").write_bytes(VECTOR.tobytes()[:-1])
    (tmp_path.parent / "outside").write_bytes(VECTOR.tobytes())
    (tmp_path / "link").symlink_to("../outside")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngineLoadError, match="cannot open the graph"):
        engines.open(with_data(**where))


def test_an_operator_that_does_not_exist_is_named(save):
    path = save([("Frobnicate", ["x"], ["y"])], [("x", 1, [4])], [("y", 1, [4])])
    with pytest.raises(EngineLoadError, match="Frobnicate"):
        engines.open(path)


def test_an_operator_of_a_foreign_domain_is_refused(save):
    node = ("Thing", ["x"], ["y"], {"domain": "evil.example"})
    with pytest.raises(EngineLoadError, match=r"Thing|evil\.example"):
        engines.open(save([node], [("x", 1, [4])], [("y", 1, [4])], opsets=[("", 20), ("evil.example", 1)]))


def test_a_tensor_of_a_type_that_numpy_lacks_is_refused(save, onnx):
    path = save([("Identity", ["x"], ["y"])], [("x", 8, [4])], [("y", 8, [4])])
    with pytest.raises(EngineLoadError, match=r"'x' is a tensor\(string\)"):
        engines.open(path)


def test_a_size_without_a_name_gets_one(save):
    path = save([("Identity", ["x"], ["y"])], [("x", 1, [None, 4])], [("y", 1, [None, 4])])
    with engines.open(path) as engine:
        assert engine.inputs[0].shape == ("x_0", 4)


@pytest.fixture
def expand(save):
    """y = the sum of n ones: takes as much memory as it is asked to."""
    nodes = [("Expand", ["one", "n"], ["many"]), ("ReduceSum", ["many"], ["y"], {"keepdims": 0})]
    with engines.open(save(nodes, [("one", 1, [1]), ("n", 7, [1])], [("y", 1, [])]), threads=1) as engine:
        engine.bind({"one": np.ones(1, np.float32)})
        yield engine


def test_a_run_that_runs_out_of_memory_says_how_much_it_wanted_and_the_next_one_works(expand):
    for _ in range(3):
        with pytest.raises(EngineMemoryError, match=r"could not allocate \d+ MB in one block"):
            expand.run({"n": np.array([2**60])})
        assert expand.run({"n": np.array([1000])})["y"] == 1000


def test_sizes_that_do_not_fit_together_are_the_backends_error_and_it_says_nothing_else(capfd):
    with engines.open(HERE / "affine.onnx") as engine:
        feeds = {"x": np.ones((2, 3), np.float32), "lora": np.ones((3, 2), np.float32), "step": np.int64(1)}
        with pytest.raises(EngineError, match=r"running the graph failed\n  why: .*Add"):
            engine.run(feeds)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_no_graph_is_refused_without_a_word_on_stderr(tmp_path, capfd):
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineLoadError):
        engines.open(tmp_path / "graph.onnx")
    assert capfd.readouterr() == ("", "")


def test_odd_graphs_from_other_projects_open_or_are_refused(shared_data):
    odd = sorted((shared_data / "bad_models").glob("*.onnx"))
    assert odd
    for path in odd:
        try:
            engines.open(path, threads=1).close()
        except EngineLoadError as error:
            assert path.name in error.what


# Refit: initialisers that are inputs, too


def test_a_refit_that_fails_at_any_constant_replaces_none(monkeypatch):
    import onnxruntime as ort

    make = ort.OrtValue.ortvalue_from_numpy
    left = [0]  # how many more can be made

    def fails(array, *device):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return make(array, *device)

    x, weights = np.ones((1, 3), np.float32), {"w": np.ones((3, 2), np.float32), "b": VECTOR[None, :2]}
    with engines.open(HERE / "refittable.onnx") as engine:
        engine.refit(weights)
        before = engine.run({"x": x})["y"]
        for good in range(len(weights)):
            left[0] = good
            with monkeypatch.context() as patch:
                patch.setattr(ort.OrtValue, "ortvalue_from_numpy", fails)
                with pytest.raises(EngineMemoryError):
                    engine.refit({name: 2 * array for name, array in weights.items()})
            np.testing.assert_array_equal(engine.run({"x": x})["y"], before)


def test_onnx_runtime_does_not_warn_of_constants_that_can_be_refitted(capfd):
    with engines.open(HERE / "refittable.onnx") as engine:
        engine.refit({"b": VECTOR[None, :2]})
        engine.run({"x": np.ones((1, 3), np.float32)})
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from Linux")
def test_a_closed_graph_leaves_no_memory_behind(onnx, save):
    side, count = 1024, 40
    names = ["x", *(f"x{k}" for k in range(1, count)), "y"]
    nodes = [("MatMul", [names[k], f"w{k}"], [names[k + 1]]) for k in range(count)]
    shape, float32 = [1, side], onnx.TensorProto.FLOAT
    weights = np.random.default_rng(0).standard_normal((count, side, side), np.float32)
    constants = [onnx.numpy_helper.from_array(weights[k], f"w{k}") for k in range(count)]
    path = save(nodes, [("x", float32, shape)], [("y", float32, shape)], constants)
    del constants
    memory.give_back()
    before = memory.resident_bytes()
    with engines.open(path) as engine:
        engine.run({"x": np.ones(shape, np.float32)})
    assert memory.resident_bytes() - before < weights.nbytes / 2
