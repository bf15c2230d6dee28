"""bench/gpu.py on a machine without a GPU: errors, processes, results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyperrt.bundle.bundle import Bundle, packaged
from hyperrt.engines.nvidia import driver
from hyperrt.plans import build
from tests.conftest import has_gpu
from tests.engines import fake_nvidia

BENCH = Path(__file__).resolve().parents[1] / "bench"
CARD = driver.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * 10**9)
DRIVER = driver.Driver("580.95.05", (13, 0), (CARD,))
OURS = ("onnxruntime_cuda", "tensorrt_inputs")
FIGURES = {"step_ms": 2.0, "switch_ms": 0.5, "picture_s": 0.06, "peak_gb": 3.0}


@pytest.fixture
def bench(monkeypatch):
    """bench(name): a module of the folder, imported afresh."""
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)

    def load(name):
        return __import__(name)

    yield load
    for name in set(sys.modules) - before:
        if name.startswith(("gpu", "report", "peer_")):
            del sys.modules[name]


def test_without_a_gpu_the_exit_code_is_7_and_the_message_says_why():
    if has_gpu():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCH / "gpu.py"), "--only", "floor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 7 and done.stdout == ""
    assert (
        done.stderr.startswith("error: there is no NVIDIA driver\n  why: ") and done.stderr.count("\n") == 3
    )


def test_every_kind_has_a_module_and_a_line_in_the_docstring(bench):
    gpu = bench("gpu")
    for module, _ in gpu.KINDS.values():
        assert "def measure(args" in (BENCH / f"{module}.py").read_text(encoding="utf-8")
    assert set(gpu.QUICK) <= gpu.KINDS.keys()
    for kind in [*gpu.KINDS][:-1]:
        assert kind in gpu.__doc__, kind


def test_a_failed_kind_is_absent_with_the_lines_of_the_error(bench, monkeypatch):
    gpu = bench("gpu")
    args = argparse.Namespace(child="onnxruntime_cuda", bundle="tiny", warm_up=1, rounds=1, steps=1)
    if has_gpu():
        pytest.skip("there is a GPU")
    pytest.importorskip("onnxruntime")
    assert gpu.child(args)["absent"].count("\n  ") == 2
    monkeypatch.setitem(gpu.KINDS, "odd", ("gpu_timing", {}))  # a module without `measure`
    assert gpu.child(argparse.Namespace(child="odd"))["absent"].startswith("AttributeError: ")


def test_a_missing_package_is_the_reason(bench, monkeypatch):
    gpu = bench("gpu")
    for name in ("torch", "export"):
        monkeypatch.setitem(sys.modules, name, None)
    for module, kind in (("gpu_torch", "eager_naive"), ("gpu_floor", "floor")):
        monkeypatch.delitem(sys.modules, module, raising=False)
        assert "PyTorch" in gpu.child(argparse.Namespace(child=kind))["absent"]


def test_pytorch_without_a_gpu_is_not_timed(bench):
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip("this PyTorch has a GPU")
    for package in ("diffusers", "onnxscript"):
        pytest.importorskip(package)
    gpu = bench("gpu")
    for kind in ("eager_naive", "floor"):
        args = argparse.Namespace(child=kind, family="sdxl", quick=False, precision="fp16")
        assert "sees no GPU" in gpu.child(args)["absent"]


# Child processes


@pytest.fixture
def run(bench, tmp_path):
    """run(code, limit): the result of a child that runs the code."""
    children = bench("gpu_children")

    def run(code, limit=60.0):
        memory = children.DeviceMemory()
        return children.run([sys.executable, "-c", code], tmp_path / "log", limit, memory)

    return run


def test_the_result_is_the_last_line_of_the_child(run):
    assert run("print('a word'); print('measuring'); print('{\"step_ms\": 2}')") == {"step_ms": 2}


def test_a_child_that_fails_is_absent_with_its_error(run):
    reason = run(
        "import sys; print('error: no plan\\n  why: old\\n  do:  new', file=sys.stderr); sys.exit(5)"
    )
    assert reason == {"absent": "the process ended with 5\nerror: no plan\n  why: old\n  do:  new"}
    assert run("import os; os.kill(os.getpid(), 9)") == {"absent": "the process ended with -9"}
    assert "ended with 0" in run("print('nothing')")["absent"]


def test_a_child_that_exceeds_the_limit_is_killed_with_its_children(run, tmp_path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    assert run(code, limit=2) == {"absent": "not done after 2 s"}
    pid = (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 20  # the signal takes a moment
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(pid)


def is_gone(pid):
    """Whether the process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_error_is_the_end_of_a_long_output(bench):
    last_words = bench("gpu_timing").last_words
    assert (
        last_words("warning\nerror: old\nmore\nerror: a\n  why: b\n  do:  c\n")
        == "error: a\n  why: b\n  do:  c"
    )
    assert last_words("1\n2\n\n3\n4\n") == "2\n3\n4"
    assert last_words("") == ""


def test_device_memory_is_the_growth_since_the_start_and_the_peak_since_start_over(
    bench, monkeypatch, tmp_path
):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 1000; echo '[N/A]'; echo 9000; echo 3000; exec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with bench("gpu_children").DeviceMemory() as memory:
        deadline = time.monotonic() + 20
        while memory._now != 3000 and time.monotonic() < deadline:  # the last number
            time.sleep(0.01)
        assert memory.peak_gb == pytest.approx(8000 * 1024**2 / 1e9)
        memory.start_over()
        assert memory.peak_gb == pytest.approx(2000 * 1024**2 / 1e9)


def test_without_nvidia_smi_the_device_memory_is_unknown(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with bench("gpu_children").DeviceMemory() as memory:
        assert memory.peak_gb is None


def test_the_bundle_of_an_option_is_used_and_its_refit_form_is_beside_it(bench, monkeypatch, tmp_path):
    children = bench("gpu_children")
    for name in ("mine", "mine-refit"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bundle.json").touch()
    args = argparse.Namespace(
        bundle_sdxl=tmp_path / "mine", bundle_sd15=None, work=tmp_path, precision="fp16"
    )
    assert children.bundle(args, "sdxl", "inputs") == str(tmp_path / "mine")
    assert children.bundle(args, "sdxl", "refit") == str(tmp_path / "mine-refit")
    failed = subprocess.CompletedProcess([], 1, "", "error: no diffusers\n  why: x\n  do:  y\n")
    monkeypatch.setattr(children.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(Exception, match="the export failed\nerror: no diffusers"):
        children.bundle(args, "sd15", "inputs")


# HyperRT's kinds


def test_a_backend_with_plans_is_compiled_and_synchronised(bench, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    if "tiny" not in packaged():
        pytest.skip("the default bundle is not in this checkout")
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path))
    cuda, _ = fake_nvidia.install(monkeypatch)
    waits = []
    monkeypatch.setattr(cuda, "cudaDeviceSynchronize", lambda: waits.append(1), raising=False)
    monkeypatch.setattr(build.tensorrt_build, "build", fake_nvidia.build)
    monkeypatch.setattr(build, "version", lambda backend: "11.4.0.106")

    def compile_bundle(name, backend):
        bundle = Bundle.open(name)
        list(build.compile_bundle(bundle, backend, ["current"], build.sizes_of(bundle, 1, 3)))

    engines_kind = bench("gpu_engines")
    monkeypatch.setattr(engines_kind, "compile_bundle", compile_bundle)
    args = argparse.Namespace(bundle="tiny", rounds=2, warm_up=1, steps=2)
    figures = engines_kind.measure(args, "tensorrt")
    assert figures.keys() == {*FIGURES, "compile_s"} and min(figures.values()) > 0
    assert len(waits) == 3  # one for each change of subject


def test_a_bundle_that_does_not_compile_is_absent_with_the_error_of_the_command(bench, monkeypatch):
    engines_kind = bench("gpu_engines")
    output = "a warning\nerror: cannot compile\n  why: sm_90 is not supported\n  do:  use another\n"
    done = subprocess.CompletedProcess([], 7, "", output)
    monkeypatch.setattr(engines_kind.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(Exception, match=r"^error: cannot compile\n  why: sm_90 is not .*\n  do:") as caught:
        engines_kind.compile_bundle("tiny", "tensorrt-rtx")
    assert type(caught.value).__name__ == "Absent"


# The file of results


def test_the_file_holds_gpu_driver_versions_figures_and_reasons(bench, tmp_path):
    results = bench("gpu_results").Results(DRIVER, tmp_path / "new" / "results.json")
    results.add("sdxl", "eager_naive", FIGURES)
    results.add("sdxl", "tensorrt_rtx_inputs", {"absent": "sm_90 is not supported"})
    kept = json.loads((tmp_path / "new" / "results.json").read_text())
    assert (kept["card"], kept["driver"]) == (CARD.name, "580.95.05, CUDA 13.0")
    assert kept.keys() >= {"bench", "commit", "machine", "versions"}
    assert kept["figures"] == {f"sdxl_eager_naive_{field}": value for field, value in FIGURES.items()}
    assert kept["absent"] == {"sdxl_tensorrt_rtx_inputs": "sm_90 is not supported"}


def test_a_later_run_adds_its_kinds_and_replaces_their_former_results(bench, tmp_path):
    make, path = bench("gpu_results").Results, tmp_path / "results.json"
    first = make(DRIVER, path)
    first.add("sdxl", "eager_naive", FIGURES)
    first.add("sdxl", "floor", {"absent": "no torch"})
    second = make(DRIVER, path)
    second.add("sdxl", "floor", {"step_ms": 1.0})
    second.add("sdxl", "eager_naive", {"absent": "no memory"})
    assert second.figures == {"sdxl_floor_step_ms": 1.0}
    assert second.absent == {"sdxl_eager_naive": "no memory"}
    another = dataclasses.replace(DRIVER, gpus=(dataclasses.replace(CARD, name="NVIDIA L4"),))
    assert make(another, path).figures == {}


def test_the_file_is_named_for_the_gpu_and_is_not_written_for_a_cpu(bench):
    results = bench("gpu_results")
    assert results.Results(DRIVER, None).path == BENCH / "results" / "gpu-nvidia-h100-80gb-hbm3.json"
    assert results.Results(None, None).path is None


def test_ratios_are_of_our_fastest_kind_in_the_largest_family(bench):
    figures = {f"sd15_onnxruntime_cuda_{field}": 99.0 for field in ("step_ms", "switch_ms")}
    figures |= {"sdxl_onnxruntime_cuda_step_ms": 40.0, "sdxl_onnxruntime_cuda_switch_ms": 9.0}
    figures |= {"sdxl_tensorrt_inputs_step_ms": 30.0, "sdxl_tensorrt_inputs_switch_ms": 5.0}
    figures |= {"sdxl_floor_step_ms": 20.0, "sdxl_compile_naive_step_ms": 60.0}
    summary = bench("gpu_results").summary
    expected = {"switch_ms": 5.0, "sdxl_step_over_floor": 1.5, "vs_compile_naive": 0.5}
    assert summary(figures, OURS) == expected
    faster = summary(figures | {"sdxl_reduce_naive_step_ms": 50.0}, OURS)
    assert faster["vs_compile_naive"] == 0.6
    assert summary({"sdxl_floor_step_ms": 20.0}, OURS) == {}


# PyTorch's kinds and the floor


@pytest.fixture
def torch_ways(bench):
    """(gpu_torch, a function that builds the tiny model)."""
    for package in ("torch", "diffusers", "onnxscript"):
        pytest.importorskip(package)
    gpu_torch = bench("gpu_torch")
    args = argparse.Namespace(family="tiny", precision="fp32")
    return gpu_torch, lambda: gpu_torch.build(args, "cpu", "")


def test_naive_and_rows_compute_the_same_step_for_every_subject(torch_ways):
    torch = pytest.importorskip("torch")
    gpu_torch, build_model = torch_ways
    results = {}
    with torch.no_grad():
        for way in (gpu_torch.naive, gpu_torch.rows):
            model = build_model()
            step, put = way(model)
            latents = []
            for subject in (0, 1, 0):
                put(model.subjects[subject])
                latents.append(step(model.feeds["latents"]))
            results[way] = torch.stack(latents)
            assert torch.equal(latents[0], latents[2]) and not torch.equal(latents[0], latents[1])
    naive, rows = results.values()
    assert (naive - rows).abs().max() < 1e-4 * naive.abs().max()


def test_the_recorded_operations_of_a_step_are_those_that_are_counted(bench):
    for package in ("torch", "diffusers", "onnxscript"):
        pytest.importorskip(package)
    floor = bench("gpu_floor")
    for family, operations in floor.COUNTED.items():
        assert floor.counted(family) == operations
