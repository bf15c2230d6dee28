"""Where and how a training computes: device, precision, seeds, memory.

bf16 autocast is used only where the hardware multiplies in bf16; on other processors it is slower than fp32.
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
    """The device of that name; None: the GPU if there is one, else the processor."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def has_bf16(device: torch.device) -> bool:
    """Whether the device has units for bf16 products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in BF16_UNITS)


def computes_bf16(device: torch.device, precision: str | None = None) -> bool:
    """Whether products are to be of bf16: if `precision` says so, or says nothing and that is fast."""
    return has_bf16(device) if precision is None else precision == "bf16"


def autocast(device: torch.device, precision: str | None = None) -> AbstractContextManager[object]:
    """bf16 or fp32, as `computes_bf16`."""
    if computes_bf16(device, precision):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def frozen_dtype(device: torch.device, precision: str | None = None) -> torch.dtype:
    """What the weights of a frozen network are kept in: bf16 on a GPU that computes in it anyway.

    On a processor they stay fp32: memory is not what is short there, and a base model that was trained beside
    them goes on to give the same numbers.
    """
    half = device.type == "cuda" and computes_bf16(device, precision)
    return torch.bfloat16 if half else torch.float32


def seed_everything(seed: int) -> None:
    """Seeds the global generators; what must be repeatable draws from generators of its own all the same."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def prepare(threads: int | None = None) -> None:
    """Set up the process for a long run on a processor.

    Denormal numbers (fresh Adam states) are slow, so they count as zero. glibc hands every large activation
    back to the system and faults it in again at the next step; with higher thresholds it keeps them.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


class Memory:
    """The most memory in use since this was made, in bytes: `peak`, and `growth` above what it began with.

    Of a GPU PyTorch's own tensors, of a processor the whole process (0 where the system does not tell).
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
