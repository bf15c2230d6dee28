"""What is not bit for bit the plan that was built is refused, before it reaches a vendor's code."""

from __future__ import annotations

import json
import os
import random

import pytest

from hyperrt import files
from hyperrt.errors import IntegrityError
from hyperrt.plans import record as plan_file
from tests.hyperrt.some_plans import COMPILE, KEY, OTHER, flip, key, publish, refused

# Keys


def test_every_part_of_a_key_makes_another_id():
    changes = {
        "graph": "cd" * 32,
        "backend": "tensorrt-rtx",
        "version": "10.16.0.72",
        "target": "sm90 NVIDIA H200",
        "sizes": (("h", 64), ("rows", 2)),
        "flags": ("refit",),
    }
    assert set(changes) == set(vars(KEY))
    ids = {KEY.id, *(key(**{name: value}).id for name, value in changes.items())}
    assert len(ids) == 7 and all(len(id) == 32 and int(id, 16) >= 0 for id in ids)


def test_an_id_stays_what_it_is():
    assert KEY.id == "b87c2ec53fe5fd372dfe03c91f5cafb0"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"graph": "x"}, "64 hex digits"),
        ({"backend": ""}, "not a name"),
        ({"version": "10\n"}, "control characters"),
        ({"target": " "}, "not a name"),
        ({"sizes": (("rows", 3), ("h", 64))}, "sorted"),
        ({"sizes": (("h", 64), ("h", 64))}, "twice"),
        ({"flags": ("refit", "refit")}, "twice"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_key_that_is_ambiguous_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        key(**changes)


# What is damaged


def test_no_flipped_bit_of_a_plan_gets_through(cache, plan):
    bits = random.Random(0)
    for _ in range(200):
        bit = bits.randrange(8 * plan.bytes)
        flip(plan.path, bit)
        refused(cache, "is damaged\n.*sha256 is .*plan.json says")
        flip(plan.path, bit)
    assert cache.load(KEY) == plan


def test_a_flipped_bit_of_the_record_is_refused_or_changes_only_a_description(cache, plan):
    record = plan.folder / "plan.json"
    bits = random.Random(0)
    for byte in range(record.stat().st_size):
        bit = 8 * byte + bits.randrange(8)
        flip(record, bit)
        try:
            loaded = cache.load(KEY)
        except IntegrityError:
            pass
        else:
            assert (loaded.key, loaded.bytes, loaded.sha256) == (plan.key, plan.bytes, plan.sha256)
        flip(record, bit)
    assert cache.load(KEY) == plan


@pytest.mark.parametrize("name", ["plan", "plan.json"])
def test_no_truncated_or_longer_file_gets_through(cache, plan, name):
    path = plan.folder / name
    whole = path.read_bytes()
    for size in {0, 1, len(whole) - 1, *range(0, len(whole), max(1, len(whole) // 200))}:
        path.write_bytes(whole[:size])
        refused(cache, "is damaged")
    path.write_bytes(whole + b"x")
    refused(cache, "is damaged")


def test_the_size_of_both_sides_is_said(cache, plan):
    os.truncate(plan.path, 4999)
    refused(cache, "it has 4,999 bytes, and plan.json says 5,000")


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": 1}', b"{}" + b" " * plan_file.MAX_RECORD],
    ids=lambda data: repr(data[:20]),
)
def test_a_record_that_is_none_is_refused(cache, plan, data):
    (plan.folder / "plan.json").write_bytes(data)
    refused(cache, "is damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 4999},
        {"bytes": True},
        {"format": 1},
        {"sha256": "0" * 64},
        {"created": -1.0},
        {"created": 1e300},
        {"bundle": ""},
        {"weights": "all"},
        {"more": 1},
        {"key": {}},
    ],
    ids=str,
)
def test_a_record_of_another_content_is_refused(cache, plan, change):
    path = plan.folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change, indent=1) + "\n")
    refused(cache, "is damaged")


def test_a_sound_plan_in_the_place_of_another_is_refused(cache, plan):
    other = publish(cache, OTHER)
    files.remove(plan.folder)
    other.folder.rename(plan.folder)
    refused(cache, f"belongs to another plan\n.*{OTHER.id}")


@pytest.mark.parametrize("name", ["plan", "plan.json"])
def test_an_entry_of_one_file_is_refused(cache, plan, name):
    (plan.folder / name).unlink()
    refused(cache, f"is not whole\n.*{name} is missing")


def test_damage_does_not_hide_the_other_plans(cache, plan):
    other = publish(cache, OTHER)
    (plan.folder / "plan.json").write_text("")
    assert cache.list() == [other]
    found = dict(cache.verify())
    assert found[other] is None and "damaged" in found[plan.folder].what
    flip(other.path, 0)
    assert "damaged" in dict(cache.verify())[other].what


def test_what_a_refusal_advises_helps(cache, plan, monkeypatch):
    flip(plan.path, 0)
    do = refused(cache, "damaged").do
    assert do == f"hyperrt plans rm {KEY.id[:12]} && {COMPILE}"
    assert cache.remove([KEY.id[:12]]) == [plan]
    assert publish(cache) == cache.load(KEY)
