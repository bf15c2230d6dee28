"""Text in messages is short and safe on a terminal, and a shell reads a command as it was meant."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

from hyperrt.text import advice, printable, short_repr, shortened
from tests.pasting import commands_in


@pytest.mark.parametrize("lines", [False, True])
def test_a_terminal_gets_no_commands(lines):
    text = printable("a\x1b[2Jb\nc\u202e\udc80é", lines=lines)
    assert text == "a\\x1b[2Jb{}c\\u202e\\udc80é".format("\n" if lines else "\\n")


def test_a_long_text_is_cut():
    assert shortened("y" * 999) == "y" * 120 + "…"
    assert shortened("a\x1b[2J" * 99, 5) == r"a\x1b[2J…"
    assert shortened("y" * 120) == "y" * 120


@pytest.mark.parametrize(
    "value", ["x" * 10**6, 10**5000, "a\nb", "\x1b[31m", [[1] * 999] * 999, np.zeros(10**6)], ids=type
)
def test_the_repr_of_a_value_is_one_short_line(value):
    assert len(short_repr(value)) < 200 and short_repr(value).isprintable()


@pytest.mark.parametrize(
    "name",
    ["a.safetensors", "My LoRA (v2).safetensors", "it's", 'a"b', "a; rm -rf x: hyperrt y", "$HOME", "雪"],
)
def test_the_words_come_back(name):
    text = advice("see what it holds", "hyperrt", "lora", "inspect", Path("folder of mine") / name)
    assert text.startswith("see what it holds: hyperrt lora inspect ")
    assert commands_in(text) == [["hyperrt", "lora", "inspect", f"folder of mine/{name}"]]


def test_a_path_is_never_an_option():
    assert advice("x", "rm", Path("-rf")) == "x: rm ./-rf"
    assert advice("x", "hyperrt", "--help") == "x: hyperrt --help"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\udcff", "a\u202eb"])
def test_what_cannot_be_printed_is_no_part_of_a_command(name):
    assert advice("see what it holds", "hyperrt", "lora", "inspect", Path(name)) == "see what it holds"


def test_commands_are_found_as_a_reader_finds_them():
    text = "run: pip uninstall onnxruntime; then: pip install 'hyperrt[cuda]'"
    assert commands_in(text) == [
        shlex.split("pip uninstall onnxruntime"),
        ["pip", "install", "hyperrt[cuda]"],
    ]
    assert commands_in("hyperrt plans rm a && hyperrt compile tiny") == [
        ["hyperrt", "plans", "rm", "a"],
        ["hyperrt", "compile", "tiny"],
    ]
    assert commands_in("add --partial, or see what NVIDIA's driver says: it knows hyperrt") == []
