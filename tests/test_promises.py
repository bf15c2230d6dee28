"""SECURITY.md's promise: nothing is written outside our folders, no name looked up, no socket opened.

Each process is watched from outside, on every backend that is installed; see watching.py.
"""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import watching
from tests.watching import ROOT, watch

MUG = str(ROOT / "examples" / "subjects" / "mug")
BACKENDS = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
CONTROL = """
import os, socket
open(os.path.expanduser("~/telemetry"), "w").close()
socket.getaddrinfo("localhost", 80)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("127.0.0.1", 9))
"""
LONG = """
import sys, time
from hyperrt import Runtime
for backend in sys.argv[2:]:
    runtime = Runtime.open("tiny", backend)
    subject = runtime.personalize(sys.argv[1], class_noun="mug")
    runtime.generate("a [V] mug", subject, steps=2)
time.sleep(20)
"""

needs_strace = pytest.mark.skipif(watching.STRACE is None, reason="needs strace")


def check_each(folder: Path, *commands: str) -> None:
    for command in commands:
        check(watch(["-m", "hyperrt", *shlex.split(command)], folder))


def check(seen: watching.Seen) -> None:
    assert seen.code == 0, seen.output
    assert not seen.written
    assert not seen.looked_up
    assert not seen.sockets
    assert not seen.sent


@needs_strace
def test_what_a_process_does_is_seen(tmp_path):
    seen = watch(["-c", CONTROL], tmp_path)
    assert seen.written == {str(tmp_path / "home" / "telemetry")}
    assert seen.looked_up and len(seen.sockets) >= 1 and seen.sent


def test_what_a_process_leaves_at_home_is_seen_without_strace(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "STRACE", None)
    assert watch(["-c", CONTROL], tmp_path).written == {str(tmp_path / "home" / "telemetry")}


@needs_strace
@pytest.mark.parametrize("vendor", BACKENDS)
def test_a_vendor_left_to_itself_is_seen(vendor, tmp_path):
    """If this fails, the vendor works otherwise than engines/telemetry.py says."""
    code = f"import {vendor}"
    if vendor == "onnxruntime":
        graph = str(ROOT / "hyperrt" / "bundles" / "tiny" / "text_encoder.onnx")
        code += f"; onnxruntime.InferenceSession({graph!r}, providers=['CPUExecutionProvider'])"
    assert watch(["-c", code], tmp_path).written


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_and_subjects_keep_the_promise(backend, tmp_path):
    check_each(
        tmp_path,
        f"personalize --images {MUG} -o mug.safetensors --backend {backend}",
        f"generate --subject mug.safetensors --prompt 'a [V] mug' --steps 2 -o a.png --backend {backend}",
        f"generate --images {MUG} -p 'a [V] mug' --steps 2 -o b.png --backend {backend} --low-memory",
        f"doctor --backend {backend}",
    )


@pytest.mark.skipif(not BACKENDS, reason="needs a backend")
def test_a_runtime_that_stays_open_keeps_the_promise(tmp_path):
    check(watch(["-c", LONG, MUG, *BACKENDS], tmp_path))


@pytest.mark.skipif(not BACKENDS, reason="needs a backend")
def test_commands_about_files_keep_the_promise(tmp_path):
    check_each(
        tmp_path,
        "--help",
        f"personalize --images {MUG} -o mug.safetensors",
        "generate --prompt 'a red house' --steps 1 -o a.png",
        "info tiny",
        "info a.png",
        "lora inspect mug.safetensors",
        "lora verify mug.safetensors --bundle tiny",
        "lora convert mug.safetensors kohya.safetensors --format kohya --rank 2",
        "plans list",
        "plans prune",
    )


@pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="needs TensorRT-RTX")
def test_compiling_keeps_the_promise(tmp_path):
    check_each(tmp_path, "compile tiny --target sm86 --graph weight_decoder")


@pytest.mark.slow
def test_training_and_export_keep_the_promise(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from tests.training import data_sets, tiny_base

    base, faces = tiny_base.make(tmp_path / "base"), data_sets.celeba(tmp_path / "faces")
    cache = tiny_base.make_cache(tmp_path / "cache", base)
    decoder = "--rank 2 --dim 16 --layers 1 --iterations 2 --head-dim 8"
    short = "--batch 4 --steps 2 --warmup 1 --holdout 2 --monitor-every 2 --device cpu"
    for command in (
        "pretrain --out world --identities 256 --views 2 --scale 0.0001 --batch 8 --workers 1",
        f"prepare --layout celeba --source {faces} --model {base} --size 32 --limit 2 --output faces",
        f"train --model {base} --data {cache} --output run {decoder} {short}",
        f"export --model tiny --base {base} --hypernet run -o bundle",
        "evaluate tiny --protocol drawn --output report --limit 2 --fast --steps 1 --scorers colours",
    ):
        seen = watch(["-m", "hyperrt", *shlex.split(command)], tmp_path, allowed=(cache,))
        # urllib3 asks the system for a socket of IPv6 when it is imported, and closes it.
        seen.sockets = [line for line in seen.sockets if "AF_INET6" not in line]
        check(seen)
