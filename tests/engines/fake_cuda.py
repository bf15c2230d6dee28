"""A stand-in for libcuda: what driver.py calls, with the driver and the GPUs that a test wants."""

from __future__ import annotations

from hyperrt.engines.nvidia import driver

OLD, NEW = 12040, 13000  # CUDA 12.4 and 13.0, as cuDriverGetVersion says them
H100 = ("NVIDIA H100 80GB HBM3", (9, 0), 80 * 10**9)
SLICE = ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 10 * 10**9)
VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"


class FakeCuda:
    """GPUs as (name, compute capability, bytes); `code` is what cuInit returns."""

    def __init__(self, *gpus, code=0, cuda=NEW):
        self.gpus = gpus
        self.code = code
        self.cuda = cuda

    def cuInit(self, flags):
        return self.code

    def cuDriverGetVersion(self, number):
        number._obj.value = self.cuda
        return 0

    def cuDeviceGetCount(self, number):
        number._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, buffer, size, device):
        buffer.value = self.gpus[device][0].encode()[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, number, which, device):
        number._obj.value = self.gpus[device][1][which - driver.MAJOR]
        return 0

    def cuDeviceTotalMem_v2(self, size, device):
        size._obj.value = self.gpus[device][2]
        return 0


def install(monkeypatch, tmp_path, *gpus, mig=False, **options):
    """Make this machine one that has NVIDIA's driver, these GPUs, and no variable that hides them."""
    monkeypatch.setattr(driver, "_libcuda", lambda: FakeCuda(*gpus, **options))
    monkeypatch.delenv(driver.VISIBLE, raising=False)
    (tmp_path / "version").write_text(VERSION)
    monkeypatch.setattr(driver, "KERNEL_MODULE", tmp_path / "version")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho {'Enabled' if mig else 'Disabled'}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def uninstall(monkeypatch):
    """Make this machine one without NVIDIA's driver."""

    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(driver, "_libcuda", missing)
