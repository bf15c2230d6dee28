"""What processor this is: how many physical cores the process may use, and whether OpenVINO suits it.

The cores are the default number of threads of a backend.

Two threads on the two halves of one core only get in each other's way in dense arithmetic, and threads beyond
a container's share wait for one another: so neither the machine's count nor its hyper-threads are right.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from hyperrt.engines.errors import EngineInputError

CPU_INFO = Path("/proc/cpuinfo")
BF16 = {"avx512_bf16", "amx_bf16"}  # what Linux calls processors that multiply bfloat16
CPUS = Path("/sys/devices/system/cpu")
# Inside a container: its own; "max 100000" or "<quota> <period>", in us.
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
            f"threads is {threads}", "a backend needs at least one", "None takes all cores"
        )
    return min(threads, os.cpu_count() or threads)


def available_cores(cpus: Path = CPUS, quota: Path = QUOTA) -> int:
    """Physical cores in this process's affinity mask, no more than the container's quota; at least 1."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    cores = {_siblings(cpus, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota(quota, len(cores))))


def suits_openvino(info: Path = CPU_INFO) -> bool:
    """Whether the processor is one of Intel's, or multiplies bfloat16."""
    text = _about(info)
    return "GenuineIntel" in text or "intel" in text.lower().split() or multiplies_bf16(info)


def multiplies_bf16(info: Path = CPU_INFO) -> bool:
    """Whether the processor has instructions for bfloat16; not known, and False, where there is no `info`."""
    return not BF16.isdisjoint(_about(info).split())


def _about(info: Path) -> str:
    try:
        return info.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor()


def _siblings(cpus: Path, cpu: int) -> str:
    """What tells the core of a logical CPU: the list of all its logical CPUs."""
    try:
        return (cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota(path: Path, otherwise: int) -> int:
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return int(quota) // int(period)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return otherwise
