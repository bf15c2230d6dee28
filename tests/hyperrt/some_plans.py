"""What tests of the plan cache share: keys, contents that tell of their key, and a cache with plans in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hyperrt.errors import HyperRTError, IntegrityError
from hyperrt.plans.cache import Plan, PlanCache, PlanKey

KEY = PlanKey("ab" * 32, "tensorrt", "10.16.0.71", "sm89", (("h", 64), ("rows", 3)))
COMPILE = "hyperrt compile tiny --backend tensorrt"
OTHER = dataclasses.replace(KEY, graph="cd" * 32)


def key(**changes: Any) -> PlanKey:
    """The usual key with changes."""
    return dataclasses.replace(KEY, **changes)


def content(of: PlanKey, size: int = 5000, mark: str = "0") -> bytes:
    """A plan of that many bytes that says whose it is, at its beginning and at its end."""
    name = f"{of.id}{mark}".encode()
    return (name * (size // len(name) + 1))[:size]


def publish(cache: PlanCache, of: PlanKey = KEY, mark: str = "0", size: int = 5000, **facts: Any) -> Plan:
    """A new plan in the cache."""
    facts = {"bundle": "tiny", "graph_name": "denoiser"} | facts
    return cache.publish(of, lambda path: path.write_bytes(content(of, size, mark)), **facts)


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file, in place."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def three_lines(error: HyperRTError) -> bool:
    """Whether an error says what, why and what to do, a line each."""
    return bool(error.what and error.why and error.do) and "\n" not in error.what + error.why + error.do


def refused(cache: PlanCache, words: str, wanted: PlanKey = KEY) -> IntegrityError:
    """The error of `load`, which says these words, and how to rebuild."""
    with pytest.raises(IntegrityError, match=words) as caught:
        cache.load(wanted, bundle="tiny")
    assert three_lines(caught.value) and caught.value.code == 8
    assert "hyperrt compile" in caught.value.do and "--backend tensorrt" in caught.value.do
    return caught.value
