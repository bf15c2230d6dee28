"""Commands in messages: a shell takes from them what was meant."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from hyperrt.text import advice
from tests.pasting import commands_in


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
