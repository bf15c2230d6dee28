"""The default number of threads."""

from __future__ import annotations

import os

import pytest

from hyperrt.engines.cpu import available_cores, suits_openvino, thread_count


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Four logical CPUs on two cores: 0 and 2 share one, 1 and 3 the other; no container."""
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    return tmp_path


def test_the_two_halves_of_a_core_count_once(machine):
    assert available_cores(machine, machine / "none") == 2


def test_cores_that_are_closed_to_the_process_do_not_count(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3})
    assert available_cores(machine, machine / "none") == 1


def test_without_a_topology_every_cpu_is_a_core(machine):
    assert available_cores(machine / "none", machine / "none") == 4


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 2), ("400000 100000", 2), ("100000 100000", 1), ("50000 100000", 1), ("?", 2)],
)
def test_a_containers_share_is_the_most(machine, quota, cores):
    (machine / "cpu.max").write_text(quota + "\n")
    assert available_cores(machine, machine / "cpu.max") == cores


def test_threads_that_the_machine_has_no_cpu_for_are_not_started():
    assert thread_count(10**9) == os.cpu_count()


def test_no_number_means_all_cores():
    assert thread_count(None) == available_cores() >= 1


@pytest.mark.parametrize(
    ("info", "suits"),
    [
        ("vendor_id : GenuineIntel\nflags : avx2", True),
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512f", False),
    ],
    ids=["Intel", "bf16", "neither"],
)
def test_openvino_suits_intel_and_processors_that_multiply_bf16(tmp_path, info, suits):
    (tmp_path / "cpuinfo").write_text(info)
    assert suits_openvino(tmp_path / "cpuinfo") is suits
