"""Plans compiled in a child process: what if it dies, and real plans where TensorRT-RTX is installed."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hyperrt.engines import EngineError, EngineInputError, EngineLoadError, EngineMemoryError
from hyperrt.engines.nvidia import tensorrt_build
from hyperrt.engines.nvidia.tensorrt_build import BuildRequest

HERE = Path(__file__).parents[1] / "graphs"
SIZES = {"rows": 2, "subjects": 1}


def request(tmp_path, **changes):
    usual = {"onnx": str(HERE / "affine.onnx"), "output": str(tmp_path / "plan")}
    return BuildRequest(**{**usual, "vendor": "tensorrt_rtx", "target": "sm89", "sizes": SIZES, **changes})


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A function: shell lines that the child runs in place of the compiler."""

    def becomes(lines):
        script = tmp_path / "child"
        script.write_text(f"#!/bin/sh\n{lines}\n")
        script.chmod(0o755)
        monkeypatch.setattr(tensorrt_build.sys, "executable", str(script))

    return becomes


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("reads", [True, False])
def test_a_compiler_that_the_system_kills_ran_out_of_memory(child, tmp_path, reads):
    child(f"{'cat > /dev/null; ' if reads else ''}kill -9 $$")
    with pytest.raises(EngineMemoryError, match=r"affine.onnx failed(?s:.*)memory ran out(?s:.*)same target"):
        tensorrt_build.build(request(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("end", "said"), [("kill -SEGV $$", signal.SIGSEGV.name), ("exit 3", "exit code 3")])
def test_a_compiler_that_crashes_is_told_of(child, tmp_path, end, said):
    child(f"cat > /dev/null; {end}")
    with pytest.raises(EngineError, match=f"the compiler ended with {said}"):
        tensorrt_build.build(request(tmp_path))


def test_progress_and_errors_come_from_the_child(child, tmp_path):
    error = '{"error": {"type": "EngineLoadError", "what": "no", "why": "because", "do": "this"}}'
    child(f"""cat > /dev/null; echo '{{"done": 0.5}}'; echo '{error}'""")
    shares = []
    with pytest.raises(EngineLoadError) as raised:
        tensorrt_build.build(request(tmp_path), shares.append)
    assert (shares, raised.value.args) == ([0.5], ("no", "because", "this"))


def test_tensorrt_11_3_is_not_used_for_refitting(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.3.0.99"))
    asked = request(tmp_path, vendor="tensorrt", target="current", refit=("w",))
    with pytest.raises(EngineLoadError, match=r"11.3.0.99(?s:.*)may lack a bias"):
        tensorrt_build._compile(asked, lambda **_: None)


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("target", ["sm86", "sm89", "sm120"])
def test_a_graph_is_compiled_for_a_gpu_that_is_not_here(rtx, tmp_path, target):
    shares = []
    built = tensorrt_build.build(request(tmp_path, target=target), shares.append)
    assert (tmp_path / "plan").stat().st_size == built.plan_bytes > 0
    assert set(built.inputs) == {"x", "lora", "step"}
    assert shares == sorted(shares) and built.peak_bytes > 1e6


def test_open_sizes_are_given_a_range(rtx, tmp_path):
    ranges = {"rows": (1, 2, 8), "subjects": (1, 1, 8)}
    assert tensorrt_build.build(request(tmp_path, sizes={}, ranges=ranges)).plan_bytes > 0
    with pytest.raises(EngineInputError, match=r"the size 'rows' is open"):
        tensorrt_build.build(request(tmp_path, sizes={}))
    with pytest.raises(EngineInputError, match="has no open sizes"):
        tensorrt_build.build(request(tmp_path, sizes={}, ranges=ranges, refit=("w",)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "sm90"}, r"no target 'sm90'(?s:.*)sm120, sm121"),
        ({"target": "none"}, "no target 'none'"),
        ({"refit": ("nothing",)}, "weight 'nothing' cannot be refitted"),
        ({"onnx": __file__}, "cannot read test_tensorrt_build.py"),
        ({"target": "sm75"}, r"for sm75(?s:.*)FP32 GEMM is not supported"),
    ],
    ids=["another target", "no target", "unknown weight", "no graph", "too old a card"],
)
def test_what_cannot_be_compiled_is_said_by_name(rtx, tmp_path, changes, said):
    with pytest.raises(EngineLoadError, match=said):
        tensorrt_build.build(request(tmp_path, **changes))
    assert not (tmp_path / "plan").exists()


def test_tensorrt_compiles_for_its_own_gpu_alone(tmp_path):
    config = SimpleNamespace()
    with pytest.raises(EngineLoadError, match="only for the GPU of this machine"):
        tensorrt_build._set_target(None, config, dataclasses.replace(request(tmp_path), vendor="tensorrt"))


def test_a_timing_cache_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "tensorrt.timing"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(Path, "replace", fails)
        tensorrt_build._replace(path, b"new")
    assert path.read_bytes() == b"old"
    tensorrt_build._replace(path, b"new")
    assert path.read_bytes() == b"new"


def fails(*_):
    raise OSError("killed")
