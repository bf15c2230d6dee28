"""Errors, and the arguments of `open`. What a backend must do is in tests/test_backend_contract.py."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
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
    "EngineForked": 7,
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


def test_importing_engines_loads_no_backend_and_no_vendor():
    code = (
        "import sys, hyperrt.engines\n"
        "print(*[name for name in sys.modules if 'onnx' in name or name == 'hyperrt.engines.fake'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def test_what_a_backend_fixes_reaches_its_module(monkeypatch, tmp_path):
    given = {}
    engine = types.SimpleNamespace()
    module = types.SimpleNamespace(
        open=lambda path, **options: given.update(options, path=path) or engine
    )
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
    message = r"the device is 1\n.*'fake' does not run on a GPU\n.*leave device out"
    with pytest.raises(EngineInputError, match=message):
        engines.open(tmp_path / "graph", "fake", device=1)
