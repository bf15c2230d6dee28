"""What a machine has of NVIDIA's, and what it lacks, in words; libcuda is a stand-in."""

from __future__ import annotations

import pytest

from hyperrt.engines import EngineError
from hyperrt.engines.nvidia import driver
from tests.engines import fake_cuda
from tests.engines.fake_cuda import H100, OLD, SLICE


def test_a_sound_driver_names_its_version_and_its_gpus(monkeypatch, tmp_path):
    fake_cuda.install(monkeypatch, tmp_path, H100, SLICE)
    installed = driver.driver()
    assert (installed.version, installed.cuda) == ("580.95.05", (13, 0))
    assert installed.gpus == (driver.Gpu(*H100), driver.Gpu(*SLICE))


def test_a_driver_that_does_not_say_its_version_is_as_good(monkeypatch, tmp_path):
    fake_cuda.install(monkeypatch, tmp_path, H100)
    monkeypatch.setattr(driver, "KERNEL_MODULE", tmp_path / "absent")
    assert driver.driver().version == ""


def fails(what, why, do):
    """The error is these three lines, and ends a command with 7."""
    with pytest.raises(EngineError) as caught:
        driver.driver()
    error = caught.value
    assert type(error) is EngineError and error.code == 7
    assert what in error.what and why in error.why and do in error.do


def test_no_driver_is_said_with_what_the_linker_said(monkeypatch):
    fake_cuda.uninstall(monkeypatch)
    fails("there is no NVIDIA driver", "libcuda.so.1: cannot open", "install NVIDIA's driver")


def test_the_real_library_is_looked_for_by_its_name(monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libcuda.of-no-machine.so")
    fails("there is no NVIDIA driver", "libcuda.of-no-machine.so", "install NVIDIA's driver")


@pytest.mark.parametrize("code", [0, driver.NO_DEVICE])
def test_no_gpu_is_said_however_the_driver_says_it(monkeypatch, tmp_path, code):
    fake_cuda.install(monkeypatch, tmp_path, code=code)
    fails("no NVIDIA GPU is visible", "shows none", "nvidia-smi")


@pytest.mark.parametrize("value", ["", "-1", "7"])
def test_gpus_that_a_variable_hides_are_not_called_missing(monkeypatch, tmp_path, value):
    fake_cuda.install(monkeypatch, tmp_path, code=driver.NO_DEVICE)
    monkeypatch.setenv(driver.VISIBLE, value)
    fails("no NVIDIA GPU is visible", driver.VISIBLE, "unset")


def test_a_gpu_in_slices_of_which_none_is_there_is_explained(monkeypatch, tmp_path):
    fake_cuda.install(monkeypatch, tmp_path, code=driver.NO_DEVICE, mig=True)
    fails("no NVIDIA GPU is visible", "MIG is on", "nvidia-smi mig")


def test_without_nvidia_smi_nothing_is_said_of_slices(monkeypatch, tmp_path):
    fake_cuda.install(monkeypatch, tmp_path, code=driver.NO_DEVICE, mig=True)
    monkeypatch.setenv("PATH", str(tmp_path / "absent"))
    fails("no NVIDIA GPU is visible", "shows none", "nvidia-smi")


@pytest.mark.parametrize("code", driver.FAILURES)
def test_a_driver_that_does_not_start_says_why_and_what_to_do(monkeypatch, tmp_path, code):
    fake_cuda.install(monkeypatch, tmp_path, H100, code=code)
    fails("does not start", *driver.FAILURES[code])


def test_an_unknown_failure_is_given_by_its_number(monkeypatch, tmp_path):
    fake_cuda.install(monkeypatch, tmp_path, H100, code=12345)
    fails("does not start", "cuInit returned 12345", "nvidia-smi")


def test_a_driver_too_old_for_a_package_is_refused_with_both_versions(monkeypatch, tmp_path):
    fake_cuda.install(monkeypatch, tmp_path, H100, cuda=OLD)
    installed = driver.driver()
    driver.check_cuda(installed, 12, "a package")
    driver.check_cuda(installed, None, "a package")
    with pytest.raises(
        EngineError, match=r"580.95.05 is too old for a package\n.*12\.4.*CUDA 13\n.*580 or later"
    ):
        driver.check_cuda(installed, 13, "a package")


@pytest.mark.gpu
def test_this_machines_gpu_is_seen():
    installed = driver.driver()
    assert installed.cuda >= (11, 0) and installed.gpus[0].memory > 10**9
    assert installed.gpus[0].name and installed.gpus[0].capability >= (5, 0)
