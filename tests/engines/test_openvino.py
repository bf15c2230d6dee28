"""What only the OpenVINO backend does: sizes, precision, its cache, external data, life after an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.engines import EngineError, EngineInputError, EngineLoadError, EngineMemoryError
from hyperrt.engines.cpu import multiplies_bf16

pytest.importorskip("openvino")
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "graphs"
AFFINE = HERE / "affine.onnx"
VECTOR = np.arange(4, dtype=np.float32)
X, LORA = np.ones((2, 3), np.float32), np.array([[10, 20]], np.float32)
FEEDS = {"x": X, "lora": LORA, "step": np.array(2, np.int64)}
Y = 2 + 2 * LORA.repeat(2, axis=0)


def open_(path, **options):
    return engines.open(path, "openvino", **{"threads": 1, "precision": "f32"} | options)


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


def test_sizes_that_do_not_fit_together_are_refused_when_opening():
    with pytest.raises(EngineLoadError, match=r"cannot open the graph .*affine.onnx\n  why: .*shapes"):
        open_(AFFINE, sizes={"rows": 2, "subjects": 3})


@pytest.mark.parametrize("threads", [1, 2])
def test_sizes_that_do_not_fit_together_are_an_error_of_the_run_and_the_next_one_works(threads, capfd):
    with open_(AFFINE, threads=threads) as engine:
        for _ in range(2):
            np.testing.assert_array_equal(engine.run(FEEDS)["y"], Y)
            with pytest.raises(EngineError, match=r"running the graph failed\n  why: .*mismatch"):
                engine.run(FEEDS | {"lora": np.ones((3, 2), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_an_unknown_precision_is_refused():
    with pytest.raises(EngineInputError, match=r"'fp8'\n.*auto, f32, bf16"):
        open_(AFFINE, precision="fp8")


@pytest.mark.parametrize(("capabilities", "precision"), [(["FP32"], "f32"), (["FP32", "BF16"], "bf16")])
def test_auto_is_bf16_where_the_processor_multiplies_it(capabilities, precision):
    from hyperrt.engines import openvino

    class Core:
        def get_property(self, device, name):
            return {("CPU", "OPTIMIZATION_CAPABILITIES"): capabilities}[device, name]

    assert openvino._precision(Core(), "auto") == precision
    assert openvino._precision(Core(), "f32") == "f32"
    if precision == "f32":
        with pytest.raises(EngineInputError, match="does not multiply bfloat16"):
            openvino._precision(Core(), "bf16")


def test_a_cache_is_filled_once_and_gives_the_same_result(tmp_path):
    cache = tmp_path / "new" / "cache"
    with open_(AFFINE, cache=cache) as engine:
        first = engine.run(FEEDS)["y"]
    blobs = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(blobs) == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    with open_(AFFINE, cache=cache) as engine:
        np.testing.assert_array_equal(engine.run(FEEDS)["y"], first)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == blobs


def test_a_cache_knows_other_weights_and_other_sizes(save, onnx, tmp_path):
    for value, sizes in ((1, {}), (2, {}), (2, {"n": 3})):
        w = onnx.numpy_helper.from_array(np.full(1, value, np.float32), "w")
        path = save([("Mul", ["x", "w"], ["y"])], [("x", 1, ["n"])], [("y", 1, ["n"])], [w])
        with open_(path, cache=tmp_path.parent / "blobs", sizes=sizes) as engine:
            np.testing.assert_array_equal(engine.run({"x": VECTOR[:3]})["y"], value * VECTOR[:3])


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_(AFFINE).close()
    assert not list(tmp_path.iterdir())


def test_a_cache_in_the_folder_of_the_graph_is_refused(save):
    path = save([("Relu", ["x"], ["y"])], [("x", 1, [4])], [("y", 1, [4])])
    with pytest.raises(EngineInputError, match="in the folder of the graph"):
        open_(path, cache=path.parent / "cache")


def test_a_cache_that_others_can_reach_is_refused(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o755)
    (tmp_path / "cache").chmod(0o755)
    with pytest.raises(EngineLoadError, match=r"others can access the cache .*\n.*\n.*chmod 700"):
        open_(AFFINE, cache=tmp_path / "cache")


def test_a_damaged_cache_is_compiled_anew(tmp_path):
    open_(AFFINE, cache=tmp_path / "cache").close()
    for blob in (tmp_path / "cache").iterdir():
        blob.write_bytes(blob.read_bytes()[: blob.stat().st_size // 2])
    with open_(AFFINE, cache=tmp_path / "cache") as engine:
        np.testing.assert_array_equal(engine.run(FEEDS)["y"], Y)


@pytest.fixture
def with_data(onnx, save):
    """with_data(location) writes y = x + w, w being four numbers in a file at `location`."""

    def saved(location, **where):
        w = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {"location": location, **where}.items():
            w.external_data.add(key=key, value=str(value))
        return save([("Add", ["x", "w"], ["y"])], [("x", 1, [4])], [("y", 1, [4])], [w])

    return saved


def test_external_data_is_read_from_beside_the_graph(with_data, tmp_path, monkeypatch):
    path = with_data("weights.data")
    (tmp_path / "weights.data").write_bytes(VECTOR.tobytes())
    monkeypatch.chdir("/")
    with open_(path) as engine:
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
    "an address in memory": {"location": "*/_ORT_MEM_ADDR_/*", "offset": 4096, "length": 16},
}


@pytest.mark.parametrize("where", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_external_data_is_refused(with_data, tmp_path, where):
    (tmp_path / "inside").write_bytes(VECTOR.tobytes())
    (tmp_path / "short").write_bytes(VECTOR.tobytes()[:-1])
    (tmp_path.parent / "outside").write_bytes(VECTOR.tobytes())
    (tmp_path / "link").symlink_to("../outside")
    with pytest.raises(EngineLoadError, match="cannot open the graph"):
        open_(with_data(**where))


def test_an_operator_that_does_not_exist_is_named(save):
    path = save([("Frobnicate", ["x"], ["y"])], [("x", 1, [4])], [("y", 1, [4])])
    with pytest.raises(EngineLoadError, match="Frobnicate"):
        open_(path)


def test_a_tensor_of_a_type_that_numpy_lacks_is_refused(save):
    path = save([("Identity", ["x"], ["y"])], [("x", 8, [4])], [("y", 8, [4])])
    with pytest.raises(EngineLoadError, match=r"'x' is a tensor\(string\)"):
        open_(path)


def test_an_input_with_a_default_is_a_constant_and_a_size_without_a_name_gets_one(save, onnx):
    w = onnx.numpy_helper.from_array(VECTOR, "w")
    inputs = [("x", 1, [None, 4]), ("w", 1, [4])]
    path = save([("Add", ["x", "w"], ["y"])], inputs, [("y", 1, [None, 4])], [w])
    with open_(path) as engine:
        assert [(spec.name, spec.shape) for spec in engine.inputs] == [("x", ("x_0", 4))]
        np.testing.assert_array_equal(engine.run({"x": VECTOR[None]})["y"], 2 * VECTOR[None])


def test_outputs_that_are_one_tensor_keep_their_names(save):
    nodes = [("Relu", ["x"], ["a"]), ("Identity", ["a"], ["b"])]
    with open_(save(nodes, [("x", 1, [4])], [("a", 1, [4]), ("b", 1, [4])])) as engine:
        results = engine.run({"x": -VECTOR})
    assert list(results) == ["a", "b"]
    np.testing.assert_array_equal(results["b"], 0 * VECTOR)


def test_a_bound_input_is_not_computed_in_place(save):
    with open_(save([("Exp", ["x"], ["y"])], [("x", 1, ["n"])], [("y", 1, ["n"])])) as engine:
        engine.bind({"x": VECTOR})
        first = engine.run({})["y"]
        np.testing.assert_array_equal(engine.run({})["y"], first)


def test_files_of_other_formats_are_refused_without_a_word_on_stderr(tmp_path, capfd):
    for content in (b"no graph", b'<?xml version="1.0"?><net name="x" version="11"></net>', b"TFL3" * 9):
        (tmp_path / "graph.xml").write_bytes(content)
        with pytest.raises(EngineLoadError):
            open_(tmp_path / "graph.xml")
    assert capfd.readouterr() == ("", "")


OUT_OF_MEMORY = """
import resource, sys
import numpy as np
from hyperrt import engines
engine = engines.open(sys.argv[1], "openvino", threads=1)
feeds = {"one": np.ones(1, np.float32)}
print(engine.run(feeds | {"n": np.array([1000])})["y"].shape)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**28,) * 2)
try:
    engine.run(feeds | {"n": np.array([10**8])})
except engines.EngineMemoryError as error:
    print(error.why)
print(engine.run(feeds | {"n": np.array([1000])})["y"].shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_a_run_that_runs_out_of_memory_says_how_much_it_wanted_and_the_next_one_works(save):
    nodes = [("Expand", ["one", "n"], ["many"]), ("Sin", ["many"], ["y"])]
    path = save(nodes, [("one", 1, [1]), ("n", 7, [1])], [("y", 1, ["k"])])
    command = [sys.executable, "-c", OUT_OF_MEMORY, path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["(1000,)", "could not allocate 400 MB in one block", "(1000,)"]
    assert EngineMemoryError.code == 6


@pytest.mark.skipif(not multiplies_bf16(), reason="this processor does not multiply bfloat16")
def test_angles_and_coefficients_are_not_rounded_to_bf16(save, onnx):
    """cos(t f) and c[1] x, and then a product with weights, in which bf16 is right."""
    frequencies = np.geomspace(1, 1e-4, 16, dtype=np.float32)
    constants = {"f": frequencies, "w": np.eye(16, dtype=np.float32), "i": np.array(1), "a": np.array([1])}
    nodes = [
        ("Reshape", ["t", "m1"], ["flat"]), ("Unsqueeze", ["flat", "a"], ["column"]),
        ("Mul", ["column", "f"], ["angle"]), ("Cos", ["angle"], ["cosine"]),
        ("MatMul", ["cosine", "w"], ["y"]),
        ("Gather", ["c", "i"], ["one"]), ("Mul", ["x", "one"], ["scaled"]),
        ("MatMul", ["scaled", "w"], ["z"]),
    ]  # fmt: skip
    constants["m1"] = np.array([-1])
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    inputs = [("t", 1, []), ("c", 1, [2]), ("x", 1, [1, 16])]
    path = save(nodes, inputs, [("y", 1, [1, 16]), ("z", 1, [1, 16])], tensors)
    scale = np.array([0, 1.005], np.float32)  # in bf16 it would be 1 + 1 / 128, and z 254 / 128
    x = np.full((1, 16), 252 / 128, np.float32)
    with open_(path, precision="bf16") as engine:
        found = engine.run({"t": np.array(999, np.float32), "c": scale, "x": x})
    np.testing.assert_allclose(found["y"][0], np.cos(999 * frequencies), atol=4e-3)
    np.testing.assert_array_equal(found["z"], 253 / 128)


SIGNALLED = """
import os, signal, sys
from hyperrt import engines
first, second = (engines.open(sys.argv[1], "openvino", threads=1) for _ in range(2))
first.close()
del first
second.close()
del second
signal.signal(signal.SIGINT, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks of Linux")
def test_ctrl_c_is_handled_after_engines_were_closed_in_the_order_in_which_they_were_opened():
    command = [sys.executable, "-c", SIGNALLED, AFFINE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "handled\n")


def test_odd_graphs_from_other_projects_open_or_are_refused(shared_data):
    odd = sorted((shared_data / "bad_models").glob("*.onnx"))
    assert odd
    for path in odd:
        try:
            open_(path).close()
        except EngineLoadError as error:
            assert path.name in error.what


def test_a_cache_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "mine")
    with pytest.raises(EngineLoadError, match="is a link"):
        open_(AFFINE, cache=tmp_path / "cache")
