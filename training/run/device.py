"""Device, precision, seeds and memory of a training.

bf16 autocast is used only if the hardware multiplies in bf16; elsewhere it is slower than fp32.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from hyperrt.engines import memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
BF16_UNITS = ("avx512_bf16", "amx_bf16", "amx_tile")  # any of them


def pick(name: str | None = None) -> torch.device:
    """The device of that name; None: the GPU if there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def has_bf16(device: torch.device) -> bool:
    """Whether the device has units for bf16 products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in BF16_UNITS)


def computes_bf16(device: torch.device, precision: str | None = None) -> bool:
    """Whether to multiply in bf16: if `precision` is "bf16", or None and the device has units for it."""
    return has_bf16(device) if precision is None else precision == "bf16"


def autocast(device: torch.device, precision: str | None = None) -> AbstractContextManager[object]:
    """A context that computes in bf16 or fp32, see `computes_bf16`."""
    if computes_bf16(device, precision):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def frozen_dtype(device: torch.device, precision: str | None = None) -> torch.dtype:
    """The type of a frozen network's weights: bf16 on a GPU that computes in bf16, else fp32.

    On a CPU memory is not scarce, and fp32 keeps the numbers of earlier trainings.
    """
    half = device.type == "cuda" and computes_bf16(device, precision)
    return torch.bfloat16 if half else torch.float32


def seed_everything(seed: int) -> None:
    """Seeds the global generators, for the initial weights; batches have generators of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def prepare(threads: int | None = None) -> None:
    """Sets up the process for a long run on a CPU.

    Denormal numbers (fresh Adam states) are slow, so they are flushed to zero. glibc returns every large
    activation to the system, and page-faults it in the next step; higher thresholds make it keep them.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


class Memory:
    """Peak memory in bytes since the object was made: `peak`, and `growth` over the use at that time.

    On a GPU it counts PyTorch's tensors, on a CPU the whole process (0 if the system does not report it).
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self.start = torch.cuda.memory_allocated(self.cuda)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, proc_pid_clear_refs(5)
        self.start = memory.resident_bytes()

    @property
    def peak(self) -> int:
        return memory.peak_bytes() if self.cuda is None else torch.cuda.max_memory_allocated(self.cuda)

    @property
    def growth(self) -> int:
        return max(0, self.peak - self.start)
