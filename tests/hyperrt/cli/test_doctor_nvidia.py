"""What `hyperrt doctor` says of NVIDIA's driver, GPUs and packages; all of them are stand-ins."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types

import pytest

from hyperrt import engines
from hyperrt.cli import doctor
from hyperrt.cli.checks import raise_first
from hyperrt.engines.nvidia import driver as nvidia
from tests.engines import fake_cuda
from tests.engines.fake_cuda import H100, OLD, SLICE
from tests.hyperrt.command_line import is_three_lines

pytestmark = pytest.mark.usefixtures("alone")
RTX = "tensorrt_rtx"


def does_not_open(*_, **options):
    raise engines.EngineError("there is no device", "this is a stand-in")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that gives this machine GPUs and packages; a package is a name and what importing it raises.

    At first there is no driver and no package of NVIDIA's.
    """
    packages: dict[str, Exception | None] = {}
    find, version = importlib.util.find_spec, importlib.metadata.version
    requires, load = importlib.metadata.requires, importlib.import_module

    def found(name):
        if name in packages:
            return importlib.machinery.ModuleSpec(name, None)
        return None if name in ("tensorrt", RTX) else find(name)

    def loaded(name, package=None):
        if name == "hyperrt.engines.nvidia.tensorrt":
            return types.SimpleNamespace(open=does_not_open, target=does_not_open)
        if packages.get(name):
            raise packages[name]
        return types.SimpleNamespace() if name in packages else load(name, package)

    def asks_for(name):
        return [f"{name}_cu13==1.0"] if name in packages else requires(name)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(importlib, "import_module", loaded)
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.0" if name in packages else version(name)
    )
    monkeypatch.setattr(importlib.metadata, "requires", asks_for)
    fake_cuda.uninstall(monkeypatch)

    def has(*gpus, installed=None, **driver):
        packages.update(installed or {})
        if gpus or driver:
            fake_cuda.install(monkeypatch, tmp_path, *gpus, **driver)

    return has


def checks(backend="fake"):
    """The checks by name, without one of a bundle: it is not there."""
    return {check.name: check for check in doctor.run("nothing", backend)}


def failed(check, code, *parts):
    assert (check.status, check.code) == ("fail", code) and check.do
    assert not [part for part in parts if part not in f"{check.detail}\n{check.do}"]
    assert "\n" not in check.detail and "Traceback" not in check.detail


def test_a_machine_without_nvidia_is_all_right(machine):
    found = checks()
    assert (found["NVIDIA GPU"].status, found["NVIDIA GPU"].detail) == (
        "ok",
        "none: there is no NVIDIA driver",
    )
    nvidias = [name for name, backend in engines.BACKENDS.items() if backend.nvidia]
    assert {found[f"backend {name}"].status for name in nvidias} == {"ok"}


def test_a_driver_and_its_gpu_are_named(machine):
    machine(H100)
    check = checks()["NVIDIA GPU"]
    assert check.status == "ok"
    assert check.detail == "driver 580.95.05, CUDA 13.0; NVIDIA H100 80GB HBM3 (sm_90, 80 GB)"


def test_a_slice_of_a_gpu_is_named_as_such(machine):
    machine(SLICE)
    assert "MIG 1g.10gb (sm_90, 10 GB)" in checks()["NVIDIA GPU"].detail


WITHOUT_GPU = {
    "no driver": ({}, None, ("no NVIDIA driver", "libcuda.so.1", "install NVIDIA's driver")),
    "no GPU": ({"code": nvidia.NO_DEVICE}, None, ("no NVIDIA GPU is visible", "nvidia-smi")),
    "all hidden": ({"code": nvidia.NO_DEVICE}, "", (nvidia.VISIBLE, "unset")),
    "slices, and none made": ({"code": nvidia.NO_DEVICE, "mig": True}, None, ("MIG is on", "nvidia-smi mig")),
    "driver and kernel of different versions": ({"code": 803}, None, ("does not start", "restart")),
}


@pytest.mark.parametrize(("driver", "visible", "parts"), WITHOUT_GPU.values(), ids=WITHOUT_GPU)
def test_a_gpu_that_is_missing_fails_with_7_only_where_it_is_wanted(
    machine, monkeypatch, driver, visible, parts
):
    machine(installed={RTX: None}, **driver)
    if visible is not None:
        monkeypatch.setenv(nvidia.VISIBLE, visible)
    unwanted = checks()
    assert {unwanted[name].status for name in ("NVIDIA GPU", "backend tensorrt-rtx")} == {"ok"}
    wanted = checks("tensorrt-rtx")
    failed(wanted["NVIDIA GPU"], 7, *parts)
    with pytest.raises(Exception, match="NVIDIA GPU: ") as caught:
        raise_first(wanted.values())
    assert caught.value.code == 7


def test_a_driver_too_old_for_the_package_fails_with_both_versions(machine):
    machine(H100, cuda=OLD, installed={RTX: None})
    assert checks()["backend tensorrt-rtx"].status == "ok"
    failed(checks("tensorrt-rtx")["backend tensorrt-rtx"], 7, "12.4", "CUDA 13", "580 or later")


@pytest.mark.parametrize(
    "error",
    [
        OSError("libnvinfer.so.11: cannot open shared object file"),
        ImportError("libnvinfer.so.11: cannot open shared object file"),
        ModuleNotFoundError(
            "No module named 'tensorrt_bindings', libnvinfer.so.11", name="tensorrt_bindings"
        ),
    ],
    ids=["OSError", "ImportError", "its other package"],
)
def test_a_library_that_is_missing_is_a_line_and_fails_only_where_it_is_wanted(machine, error):
    machine(H100, installed={"tensorrt": error})
    unwanted = checks()["backend tensorrt"]
    assert unwanted.status == "warn" and "libnvinfer.so.11" in unwanted.detail
    failed(checks("tensorrt")["backend tensorrt"], 7, "libnvinfer.so.11", "pip install")


def test_a_package_that_is_missing_fails_with_4_and_its_line(machine):
    machine(H100)
    failed(
        checks("tensorrt-rtx")["backend tensorrt-rtx"],
        4,
        "not installed",
        "pip install 'hyperrt[tensorrt-rtx]'",
    )


def test_the_cpus_onnx_runtime_is_not_taken_for_the_gpus(machine):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this is the package for GPUs")
    machine(H100)
    assert checks()["backend onnxruntime-cuda"].status == "ok"
    failed(
        checks("onnxruntime-cuda")["backend onnxruntime-cuda"], 7, "no CUDAExecutionProvider", "hyperrt[cuda]"
    )


def test_a_sound_machine_passes(machine):
    machine(H100, installed={RTX: None})
    found = checks("tensorrt-rtx")
    assert found["backend tensorrt-rtx"].status == found["NVIDIA GPU"].status == "ok"
    assert found["backend tensorrt-rtx"].detail == "tensorrt_rtx 1.0"


def test_the_command_ends_with_7_and_no_traceback(machine, run):
    machine(installed={RTX: None})
    code, out, err = run("doctor", "--backend", "tensorrt-rtx")
    assert code == 7 and is_three_lines(err)
    assert "FAIL  NVIDIA GPU: there is no NVIDIA driver" in out
    assert "Traceback" not in out + err and "tensorrt" not in sys.modules


@pytest.mark.gpu
def test_this_machines_gpu_is_named():
    assert nvidia.driver().gpus[0].name in checks()["NVIDIA GPU"].detail
