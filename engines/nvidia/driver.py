"""NVIDIA's driver and its GPUs, asked through libcuda: for backends that run there, and for `hyperrt doctor`.

Nothing has to be installed for this to be imported or called.  What is missing is an `EngineError`, with the
exit code 7.  Codes and calls: cuda.h.
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
# What cuInit says beside "no device" -> why, what to do
FAILURES = {
    34: (f"{LIBRARY} is the stub that programs are linked with", "take its folder out of LD_LIBRARY_PATH"),
    802: ("the GPUs are not ready yet", "start NVIDIA's fabric manager, or wait for it"),
    803: (f"{LIBRARY} and the kernel module are of different versions", "restart the machine"),
    804: ("the CUDA compatibility package does not support this GPU", "remove it, or update the driver"),
    999: ("the driver does not answer", "restart the machine, or load the module nvidia_uvm"),
}
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # major version of CUDA -> the oldest driver that runs it
NAME_BYTES, MAJOR, MINOR = 256, 75, 76  # of cuDeviceGetName; of cuDeviceGetAttribute


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG slice of one, that this process may use.

    Attributes:
        name: as its maker calls it; a slice's has "MIG" in it.
        capability: its compute capability, (9, 0) of an H100.
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Driver:
    """What the driver says.

    Attributes:
        version: such as "580.95.05"; "" where the system does not say.
        cuda: the newest CUDA that it runs, such as (13, 0).
        gpus: those that this process may use, at least one.
    """

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


def driver() -> Driver:
    """The driver, started.

    Raises:
        EngineError: there is none, it does not start, or it shows no GPU to this process.
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
        why, do = FAILURES.get(code, (f"cuInit returned {code}", "run nvidia-smi, and see what it says"))
        raise EngineError("the NVIDIA driver does not start", why, do)
    newest = _number(cuda.cuDriverGetVersion)  # 13000 is 13.0, 12040 is 12.4
    gpus = tuple(_gpu(cuda, k) for k in range(count))
    return Driver(_version(), (newest // 1000, newest % 1000 // 10), gpus)


def check_device(found: Driver, index: int) -> None:
    """Refuse a GPU that is not there.

    Raises:
        EngineError: with those that are.
    """
    count = len(found.gpus)
    if not 0 <= index < count:
        why = f"this process sees {count} of them: {', '.join(map(str, range(count)))}"
        do = f"choose one of these; {VISIBLE}, if it is set, hides the others"
        raise EngineError(f"there is no NVIDIA GPU {index}", why, do)


def check_cuda(found: Driver, needed: int | None, package: str) -> None:
    """Refuse a driver that is too old for a package.

    Args:
        needed: major version of the CUDA that the package was built with; None where it does not say.
        package: its name, for the message.

    Raises:
        EngineError: with both versions.
    """
    if needed is not None and found.cuda[0] < needed:
        version = f" {found.version}" if found.version else ""
        oldest = f"{OLDEST_DRIVER[needed]} or later" if needed in OLDEST_DRIVER else "a later one"
        raise EngineError(
            f"the NVIDIA driver{version} is too old for {package}",
            f"it runs CUDA up to {found.cuda[0]}.{found.cuda[1]}, the package needs CUDA {needed}",
            f"install the driver {oldest}, or an older {package}",
        )


def _no_gpu() -> EngineError:
    # An empty list hides all GPUs, and so does one whose first entry there is not.
    if VISIBLE in os.environ:
        why, do = f"{VISIBLE} is set, and names no GPU that is there", f"unset {VISIBLE}, or set it to 0"
    elif _mig_is_on():
        why = "MIG is on, and no instance of it is there for this process"
        do = "make one: nvidia-smi mig -cgi; or give one to the container"
    else:
        why = "the driver shows none to this process"
        do = "see what nvidia-smi says; start a container with its GPUs"
    return EngineError("no NVIDIA GPU is visible", why, do)


def _mig_is_on() -> bool:
    """Whether a GPU of the machine is cut into slices: CUDA sees it only through them."""
    command = ("nvidia-smi", "--query-gpu=mig.mode.current", "--format=csv,noheader")
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return "Enabled" in said


def _libcuda() -> Any:
    return ctypes.CDLL(LIBRARY)


def _number(call: Any, *arguments: Any) -> int:
    """What a call of libcuda writes to its first argument; 0 where it fails."""
    number = ctypes.c_int(0)
    return 0 if call(ctypes.byref(number), *arguments) else number.value


def _gpu(cuda: Any, index: int) -> Gpu:
    device = _number(cuda.cuDeviceGet, index)
    name = ctypes.create_string_buffer(NAME_BYTES)
    cuda.cuDeviceGetName(name, NAME_BYTES, device)
    memory = ctypes.c_size_t(0)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = tuple(_number(cuda.cuDeviceGetAttribute, which, device) for which in (MAJOR, MINOR))
    return Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]), memory.value)


def _version() -> str:
    try:
        text = KERNEL_MODULE.read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, or a container or Jetson that does not show it
        return ""
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else ""
