"""Errors and the table of backends. What a backend must do is in tests/test_backend_contract.py."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from hyperrt import engines
from hyperrt.engines import BackendMissing, EngineError, EngineInputError

ROOT = Path(__file__).resolve().parents[2]
CODES = {
    "EngineError": 7,
    "EngineInputError": 1,
    "EngineClosed": 1,
    "BackendMissing": 4,
    "EngineLoadError": 5,
    "EngineMemoryError": 6,
    "EngineUnusable": 7,
}


@pytest.mark.parametrize(("name", "code"), CODES.items(), ids=CODES)
def test_every_error_is_an_engine_error_with_its_exit_code(name, code):
    kind = getattr(engines, name)
    assert issubclass(kind, EngineError)
    assert kind.code == code


def test_an_error_is_three_lines_and_leaves_out_the_empty_ones():
    assert (
        str(EngineError("it broke", "it was old", "mend it")) == "it broke\n  why: it was old\n  do:  mend it"
    )
    assert str(EngineError("it broke")) == "it broke"


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(BackendMissing("what", "why", "do")))
    assert isinstance(error, BackendMissing)
    assert (error.what, error.why, error.do) == ("what", "why", "do")


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


def test_importing_engines_loads_no_backend_and_no_vendor():
    code = (
        "import sys, hyperrt.engines\n"
        "print(*[name for name in sys.modules if 'onnx' in name or name == 'hyperrt.engines.fake'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


AUTO = {
    "openvino where it suits": ({"openvino", "onnxruntime"}, True, "openvino"),
    "onnxruntime elsewhere": ({"openvino", "onnxruntime"}, False, "onnxruntime"),
    "the only one": ({"openvino"}, False, "openvino"),
    "none, so the default is asked for": (set(), True, "onnxruntime"),
}


@pytest.mark.parametrize(("installed", "suits", "chosen"), AUTO.values(), ids=AUTO)
def test_auto_is_the_fastest_backend_that_is_installed(monkeypatch, installed, suits, chosen):
    monkeypatch.setattr(
        "hyperrt.engines.base.find_spec", lambda name: ModuleSpec(name, None) if name in installed else None
    )
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


def test_what_a_backend_fixes_reaches_its_module(monkeypatch, tmp_path):
    given = {}
    module = types.SimpleNamespace(open=lambda path, **options: given.update(options, path=path))
    monkeypatch.setattr("hyperrt.engines.base.load", lambda name: module)
    (tmp_path / "graph").touch()
    engines.open(tmp_path / "graph", "tensorrt-rtx", threads=3, sizes={"rows": 2}, other=1)
    assert given == {
        "path": tmp_path / "graph", "threads": 3, "sizes": {"rows": 2}, "device": 0, "other": 1,
        "vendor": "tensorrt_rtx",
    }  # fmt: skip


def test_an_option_that_a_backend_does_not_have_is_refused_by_name(monkeypatch, tmp_path):
    (tmp_path / "graph").touch()
    module = types.SimpleNamespace(open=lambda path, threads, sizes, cache, precision: None)
    monkeypatch.setattr("hyperrt.engines.base.load", lambda name: module)
    with pytest.raises(EngineInputError, match=r"no option 'other'\n.*its options are: cache, precision\n"):
        engines.open(tmp_path / "graph", "openvino", precision="f32", other=1)


def test_a_device_beside_the_processor_is_refused_and_not_ignored(tmp_path):
    (tmp_path / "graph").touch()
    with pytest.raises(EngineInputError, match=r"the device is 1\n.*'fake' runs on no GPU\n.*leave it out"):
        engines.open(tmp_path / "graph", "fake", device=1)


def test_a_file_of_the_users_called_as_a_vendors_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(EngineError, match=r"not the package of that name\n.*onnxruntime\.py first\n.*rename"):
        engines.load("onnxruntime")
