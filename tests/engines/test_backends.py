"""The table of backends, its loader, and that no other file keeps a list of backends."""

from __future__ import annotations

import ast
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from hyperrt import engines
from hyperrt.engines import BackendMissing, EngineError
from hyperrt.engines.backends import BACKENDS, names

ROOT = Path(__file__).resolve().parents[2]
CODE = [
    path
    for folder in ("engines", "hyperrt", "training", "export")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "engines" / "backends.py"
]


def lists_or_compares_backends(node):
    """Whether a node is a collection with several backends' names, or a comparison with one."""
    match node:
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts) | ast.Dict(keys=parts):
            least = 2
        case ast.Compare(left=left, comparators=others):
            parts = [left, *others]
            parts += [item for part in others for item in getattr(part, "elts", [])]
            least = 1
        case _:
            return False
    return sum(isinstance(part, ast.Constant) and part.value in BACKENDS for part in parts) >= least


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_file_lists_backends_or_compares_their_names(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if lists_or_compares_backends(node)] == []


@pytest.mark.parametrize(
    "code",
    [
        '{"openvino", "tensorrt"}', '("onnxruntime", "openvino")', '{"tensorrt": 1, "tensorrt-rtx": 2}',
        'name == "openvino"', 'name in ("openvino",)',
    ],
)  # fmt: skip
def test_the_search_sees_lists_and_comparisons(code):
    assert any(map(lists_or_compares_backends, ast.walk(ast.parse(code))))


def test_lists_for_users_leave_out_the_backend_of_tests():
    assert "fake" not in names("refits") and names("runs_plans") == ["tensorrt", "tensorrt-rtx"]


@pytest.mark.parametrize("name", BACKENDS)
def test_options_that_a_graph_is_always_opened_with_are_among_those_that_the_backend_accepts(name):
    for options in BACKENDS[name].graph_options.values():
        assert options.get("precision", "auto") in {"auto", *BACKENDS[name].precisions}


def test_an_unknown_backend_is_refused_with_those_that_there_are(tmp_path):
    words = r"(?s)'onnxruntim'.*there are: onnxruntime.*mean 'onnxruntime'\?"
    with pytest.raises(BackendMissing, match=words):
        engines.open(tmp_path, "onnxruntim")


def blocked(monkeypatch, error):
    """Make `import onnxruntime` fail with `error`, as on a machine without it, or with a broken one."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "onnxruntime":
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "hyperrt.engines.onnxruntime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


def test_a_missing_vendor_package_says_what_to_install(monkeypatch, tmp_path):
    blocked(monkeypatch, ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"))
    with pytest.raises(BackendMissing, match=r"pip install 'hyperrt\[cpu\]'"):
        engines.open(tmp_path / "graph.onnx")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libonnxruntime.so: cannot open"),
        OSError("libnvinfer.so.10: cannot open"),
        ModuleNotFoundError("No module named 'x'", name="x"),
    ],
    ids=["library", "library that the package loads itself", "dependency"],
)
def test_a_broken_vendor_package_is_not_called_missing(monkeypatch, tmp_path, error):
    blocked(monkeypatch, error)
    with pytest.raises(EngineError, match="installed but does not start") as caught:
        engines.open(tmp_path / "graph.onnx")
    assert not isinstance(caught.value, BackendMissing)
    assert str(error) in caught.value.why


AUTO = {
    "openvino where it suits": ({"openvino", "onnxruntime"}, True, "openvino"),
    "onnxruntime elsewhere": ({"openvino", "onnxruntime"}, False, "onnxruntime"),
    "the only one": ({"openvino"}, False, "openvino"),
    "none, so the default is asked for": (set(), True, "onnxruntime"),
}


@pytest.mark.parametrize(("installed", "suits", "chosen"), AUTO.values(), ids=AUTO)
def test_auto_is_the_fastest_backend_that_is_installed(monkeypatch, installed, suits, chosen):
    specs = {name: ModuleSpec(name, None) for name in installed}
    monkeypatch.setattr("hyperrt.engines.backends.find_spec", specs.get)
    monkeypatch.setattr("hyperrt.engines.cpu.suits_openvino", lambda: suits)
    assert engines.resolve("auto") == chosen


def test_a_name_stands_for_itself_and_an_unknown_one_is_refused():
    assert [engines.resolve(name) for name in engines.BACKENDS] == list(engines.BACKENDS)
    with pytest.raises(BackendMissing, match="'cuda'"):
        engines.resolve("cuda")


def test_every_backend_with_a_package_says_how_to_install_it():
    for name, backend in engines.BACKENDS.items():
        assert backend.install.startswith("pip install ") == bool(backend.vendor), name


def test_backends_of_one_module_differ_in_what_they_fix():
    kinds = {(one.module, tuple(one.options.items())) for one in engines.BACKENDS.values()}
    assert len(kinds) == len(engines.BACKENDS)


def test_a_file_of_the_users_called_as_a_vendors_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(EngineError, match=r"not the package of that name\n.*onnxruntime\.py first\n.*rename"):
        engines.load("onnxruntime")
