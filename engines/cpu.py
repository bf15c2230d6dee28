"""The processor: how many physical cores this process may use, and whether OpenVINO suits it.

A backend uses one thread per physical core by default.  Hyper-threads of one core slow each other down in
dense arithmetic, and threads beyond a container's quota wait for each other.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from hyperrt.engines.errors import EngineInputError

CPU_INFO = Path("/proc/cpuinfo")
BF16 = {"avx512_bf16", "amx_bf16"}  # flags in CPU_INFO of processors that multiply bfloat16
CPUS = Path("/sys/devices/system/cpu")
# Inside a container it holds that container's quota: "max 100000" or "<quota> <period>", in microseconds.
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def thread_count(threads: int | None) -> int:
    """`threads`, or all physical cores for None; never more than the machine has CPUs.

    Raises:
        EngineInputError: less than 1.
    """
    if threads is None:
        return available_cores()
    if threads < 1:
        raise EngineInputError(
            f"threads is {threads}", "a backend needs at least one", "leave it out to use all cores"
        )
    return min(threads, os.cpu_count() or threads)


def available_cores(cpus: Path = CPUS, quota: Path = QUOTA) -> int:
    """Physical cores in this process's affinity mask, at most the container's quota; at least 1."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    cores = {_siblings(cpus, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota(quota, len(cores))))


def suits_openvino(info: Path = CPU_INFO) -> bool:
    """Whether the processor is made by Intel, or multiplies bfloat16."""
    text = _description(info)
    return "GenuineIntel" in text or "intel" in text.lower().split() or multiplies_bf16(info)


def multiplies_bf16(info: Path = CPU_INFO) -> bool:
    """Whether the processor has instructions for bfloat16; False where there is no file `info`."""
    return not BF16.isdisjoint(_description(info).split())


def _description(info: Path) -> str:
    try:
        return info.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor()


def _siblings(cpus: Path, cpu: int) -> str:
    """The logical CPUs of a logical CPU's core, as a text that identifies the core."""
    try:
        return (cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota(path: Path, default: int) -> int:
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return int(quota) // int(period)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return default
