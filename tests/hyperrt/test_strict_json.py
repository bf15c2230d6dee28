"""JSON into dataclasses: exact round trips, and an error that names the place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytest

from hyperrt.strict_json import StrictError, dump, loads, read


@dataclass(frozen=True)
class Leaf:
    size: float
    word: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    pair: tuple[int, str]
    either: int | str
    named: Mapping[str, Leaf]
    note: str | None = None


GOOD = {"leaves": [{"size": 1, "word": "b"}], "pair": [1, "x"], "either": "n", "named": {"k": {"size": 0.5}}}


def test_what_is_declared_is_read_and_written_back():
    tree = read(Tree, GOOD)
    assert tree == Tree((Leaf(1.0, "b"),), (1, "x"), "n", {"k": Leaf(0.5)})
    assert read(Tree, dump(tree)) == tree
    assert "note" not in dump(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaves": [{"size": 1}, {}]}, r"the key leaves\[1\]\.size is missing"),
        ({"leaves": [{"size": 1, "colour": 2}]}, r"leaves\[0\]\.colour is unknown; known are size, word"),
        ({"leaves": [{"size": True}]}, r"leaves\[0\]\.size is true; it must be a number"),
        ({"leaves": [{"size": 10**400}]}, r"leaves\[0\]\.size is 1000"),
        ({"leaves": [{"size": 1, "word": "c"}]}, r"word is \"c\"; it must be one of a, b"),
        ({"leaves": [{"size": 1, "word": []}]}, "it must be one of a, b"),
        ({"pair": [1]}, "pair has 1 entries; it must have 2"),
        ({"either": None}, "either is null; it must be a whole number or a text"),
        ({"named": []}, "named is \\[\\]; it must be an object"),
        ({"note": "\x1b[2J"}, "control characters"),
        ({"\x1b": 1}, r"x1b is unknown"),
    ],
)
def test_what_is_not_declared_is_refused_and_its_place_named(change, message):
    with pytest.raises(StrictError, match=message) as caught:
        read(Tree, GOOD | change)
    assert "\x1b" not in str(caught.value)


def test_a_key_that_occurs_twice_among_many_is_named_without_comparing_all_pairs():
    keys = ", ".join(f'"{k}": 0' for k in range(300_000))  # all pairs would take an hour
    with pytest.raises(StrictError, match="the key 299999 occurs twice"):
        loads(f'{{{keys}, "299999": 0}}'.encode())


def test_a_byte_order_mark_is_read_over_and_utf_16_is_refused():
    assert loads(b"\xef\xbb\xbf" + '{"a": "é"}'.encode()) == {"a": "é"}
    with pytest.raises(StrictError):
        loads("{}".encode("utf-16"))


DEEP = b"[" * 99_999


@pytest.mark.parametrize("text", [b"", b"{", b'{"a": 1, "a": 2}', b"NaN", b"-Infinity", b'"\xff"', DEEP])
def test_the_loopholes_of_json_are_closed(text):
    with pytest.raises(StrictError):
        loads(text)
