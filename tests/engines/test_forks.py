"""A forked process gets an error that says "spawn", where it would wait for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hyperrt.engines import EngineForked, forks

ROOT = Path(__file__).resolve().parents[2]
GRAPH = ROOT / "tests" / "engines" / "graphs" / "affine.onnx"
BACKENDS = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
# What the child does after "fork" is in IN_CHILD; SIGALRM ends one that hangs.
CODE = """
import gc, os, signal, sys
import numpy as np
from hyperrt import engines
def ones(engine):
    return {spec.name: np.ones([n if isinstance(n, int) else 2 for n in spec.shape], spec.dtype)
            for spec in engine.inputs}
engine = engines.open(sys.argv[1], sys.argv[2], threads=2)
before = engine.run(ones(engine))
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        IN_CHILD
        print("done")
    except engines.EngineForked as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
after = engine.run(ones(engine))
assert all(np.array_equal(before[name], after[name]) for name in before)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_child(backend: str, code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", CODE.replace("IN_CHILD", code), str(GRAPH), backend]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use", ["engine.run(ones(engine))", "engine.bind({})", "engine.refit({})"])
def test_an_engine_from_before_the_fork_says_spawn(backend, use):
    out = in_child(backend, use)
    assert out.startswith("the engine cannot be used in a forked process") and "spawn" in out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("end", ["engine.close()", "engine = None; gc.collect()", "del engine; gc.collect()"])
def test_an_engine_from_before_the_fork_is_left_without_waiting(backend, end):
    assert in_child(backend, end) == "done\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_process_opens_a_graph_of_its_own_or_is_told_to_spawn(backend):
    out = in_child(backend, "own = engines.open(sys.argv[1], sys.argv[2]); own.run(ones(own))")
    assert out == "done\n" if backend == "onnxruntime" else "spawn" in out


def test_an_engine_belongs_to_the_process_that_opened_it():
    forks.check(os.getpid())
    with pytest.raises(EngineForked, match="opened in process 0"):
        forks.check(0)
    assert EngineForked.code == 7


# The thread that holds the lock is not in the child; SIGALRM ends a child that waits for it.
HELD = """
import os, signal, sys, threading
from hyperrt.engines import EngineForked, forks
lock, held = forks.Lock(), threading.Event()
def hold():
    with lock:
        held.set()
        threading.Event().wait()
if sys.argv[1] == "held":
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        with lock, lock:
            print("free")
    except EngineForked:
        print("refused")
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize(("state", "end"), [("held", "refused"), ("free", "free")])
def test_a_lock_that_a_thread_of_the_parent_holds_is_not_waited_for(state, end):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", HELD, state]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{end}\n"), result.stderr


CLOSED = """
import os, sys, numpy as np
from hyperrt import engines
with engines.open(sys.argv[1], sys.argv[2], threads=2) as engine:
    sizes = {spec: [n if isinstance(n, int) else 2 for n in spec.shape] for spec in engine.inputs}
    engine.run({spec.name: np.ones(size, spec.dtype) for spec, size in sizes.items()})
child = os.fork()
if child == 0:
    import signal
    signal.alarm(30)
    sys.exit(3)  # with the interpreter's own end, unlike os._exit
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_process_that_is_forked_after_engines_were_closed_ends_by_itself(backend):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", CLOSED, str(GRAPH), backend]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
