"""Queries NVIDIA's driver and GPUs through libcuda, for the backends that need them and for `hyperrt doctor`.

Needs no package.  A missing driver or GPU is an `EngineError`, exit code 7.  Error codes and calls: cuda.h.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperrt.engines.errors import EngineError

LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
VISIBLE = "CUDA_VISIBLE_DEVICES"
NO_DEVICE = 100
# Other error codes of cuInit -> why, what to do.
FAILURES = {
    34: (f"{LIBRARY} is the stub for linking programs", "remove its folder from LD_LIBRARY_PATH"),
    802: ("the GPUs are not ready yet", "start NVIDIA's fabric manager, or wait for it"),
    803: (f"{LIBRARY} and the kernel module are of different versions", "restart the machine"),
    804: ("the CUDA compatibility package does not support this GPU", "remove it, or update the driver"),
    999: ("the driver does not answer", "restart the machine, or load the module nvidia_uvm"),
}
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # major version of CUDA -> the oldest driver that runs it
NAME_BYTES = 256  # of cuDeviceGetName
MAJOR, MINOR = 75, 76  # compute capability, of cuDeviceGetAttribute


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG slice of one, that this process may use.

    Attributes:
        name: such as "NVIDIA H200"; contains "MIG" if it is a slice.
        capability: compute capability, such as (9, 0).
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def sm(self) -> str:
        """The compute capability as compilers spell it, such as "sm90"."""
        return f"sm{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver.

    Attributes:
        version: such as "580.95.05"; "" if the system does not report it.
        cuda: the newest CUDA version that it supports, such as (13, 0).
        gpus: those that this process may use, at least one.
    """

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


def driver() -> Driver:
    """Start the driver and query it.

    Raises:
        EngineError: there is no driver, it does not start, or it shows no GPU to this process.
    """
    try:
        cuda = _libcuda()
    except OSError as error:
        raise EngineError(
            "there is no NVIDIA driver",
            str(error),
            "install NVIDIA's driver (in a container: start it with its GPUs), or use another backend",
        ) from error
    code = cuda.cuInit(0)
    count = 0 if code else _number(cuda.cuDeviceGetCount)
    if code in (0, NO_DEVICE) and not count:
        raise _no_gpu()
    if code:
        why, do = FAILURES.get(code, (f"cuInit returned {code}", "run: nvidia-smi"))
        raise EngineError("the NVIDIA driver does not start", why, do)
    newest = _number(cuda.cuDriverGetVersion)  # 12040 is 12.4
    gpus = tuple(_gpu(cuda, k) for k in range(count))
    return Driver(_version(), (newest // 1000, newest % 1000 // 10), gpus)


def check_device(driver: Driver, index: int) -> None:
    """Refuse the index of a GPU that does not exist.

    Raises:
        EngineError: with the indices that do.
    """
    count = len(driver.gpus)
    if not 0 <= index < count:
        why = f"this process sees {count} of them: {', '.join(map(str, range(count)))}"
        do = f"choose one of these; {VISIBLE}, if it is set, hides others"
        raise EngineError(f"there is no NVIDIA GPU {index}", why, do)


def check_cuda(driver: Driver, needed: int | None, package: str) -> None:
    """Refuse a driver that is too old for a package.

    Args:
        needed: major version of the CUDA that the package was built with; None if it is not known.
        package: name of the package, for the message.

    Raises:
        EngineError: with both versions.
    """
    if needed is not None and driver.cuda[0] < needed:
        version = f" {driver.version}" if driver.version else ""
        oldest = f"{OLDEST_DRIVER[needed]} or later" if needed in OLDEST_DRIVER else "a later one"
        raise EngineError(
            f"the NVIDIA driver{version} is too old for {package}",
            f"it supports CUDA up to {driver.cuda[0]}.{driver.cuda[1]}, the package needs CUDA {needed}",
            f"install the driver {oldest}, or an older {package}",
        )


def _no_gpu() -> EngineError:
    # An empty list hides all GPUs, and so does a list whose first entry does not exist.
    if VISIBLE in os.environ:
        why, do = f"{VISIBLE} is set, and names no GPU that exists", f"unset {VISIBLE}, or set it to 0"
    elif _mig_is_on():
        why = "MIG is on, and this process has no MIG instance"
        do = "make one: nvidia-smi mig -cgi; or give one to the container"
    else:
        why = "the driver shows none to this process"
        do = "start a container with its GPUs; list them: nvidia-smi"
    return EngineError("no NVIDIA GPU is visible", why, do)


def _mig_is_on() -> bool:
    """Whether a GPU is split into MIG slices; CUDA then sees only these."""
    command = ("nvidia-smi", "--query-gpu=mig.mode.current", "--format=csv,noheader")
    try:
        modes = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return "Enabled" in modes


def _libcuda() -> Any:
    return ctypes.CDLL(LIBRARY)


def _number(call: Any, *arguments: Any) -> int:
    """The number that a function of libcuda writes to its first argument; 0 if the call fails."""
    number = ctypes.c_int(0)
    return 0 if call(ctypes.byref(number), *arguments) else number.value


def _gpu(cuda: Any, index: int) -> Gpu:
    device = _number(cuda.cuDeviceGet, index)
    name = ctypes.create_string_buffer(NAME_BYTES)
    cuda.cuDeviceGetName(name, NAME_BYTES, device)
    memory = ctypes.c_size_t(0)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor = (_number(cuda.cuDeviceGetAttribute, part, device) for part in (MAJOR, MINOR))
    return Gpu(name.value.decode(errors="replace"), (major, minor), memory.value)


def _version() -> str:
    try:
        text = KERNEL_MODULE.read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, or a container or Jetson without that file
        return ""
    match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return match[0] if match else ""
