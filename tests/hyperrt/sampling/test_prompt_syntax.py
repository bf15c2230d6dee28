"""Syntax that other programs obey is drawn as text here: a prompt that has it is said so, with what to do."""

from __future__ import annotations

import shlex

import pytest

from hyperrt.runtime import Runtime
from hyperrt.sampling.prompt_syntax import advice
from tests.hyperrt.command_line import events


@pytest.mark.parametrize(
    ("prompt", "found", "instead"),
    [
        ("a (red:1.3) [V] mug", "(red:1.3)", "without the parentheses and the number"),
        ("a (red, shiny: 0.8 ) mug", "(red, shiny: 0.8 )", "without the parentheses and the number"),
        ("a (red)1.3 mug", "(red)1.3", "without the parentheses and the number"),
        ("a (red)++ mug", "(red)++", "without the parentheses"),
        ("a ((red)) mug", "((red))", "without the parentheses"),
        ("a [blue] [V] mug", "[blue]", "without them"),
        ("a [red:blue:0.5] mug", "[red:blue:0.5]", "without them"),
        ("a mug <lora:my mug:0.8>", "<lora:my mug:0.8>", "--subject 'my mug.safetensors' --strength 0.8"),
        ("a mug <lora:mug>", "<lora:mug>", "--subject mug.safetensors --strength 1"),
        ("a mug <lyco:m.safetensors:x>", "<lyco:m.safetensors:x>", "--subject m.safetensors --strength 1"),
        ("a mug <hypernet:x:1>", "<hypernet:x:1>", "leave it out"),
        ("a mug BREAK a beach", "BREAK", "a comma"),
        ("a mug AND a beach", "AND", "one sentence"),
        ("a {red|blue} mug", "{red|blue}", "one of the words"),
        ("a __colour__ mug", "__colour__", "the word itself"),
        (r"a mug \(cup\)", r"\(", "the parentheses alone"),
    ],
)
def test_foreign_syntax_is_named_with_what_to_use_instead(prompt, found, instead):
    [line] = advice([prompt])
    assert line.startswith(f"{found} is drawn as text: ") and instead in line


@pytest.mark.parametrize(
    "prompt",
    [
        "a [V] mug (on a beach)", "a [v] mug (at 10:30)", "a mug: red, (left) and blue", "in (4:3)", "(a: b)",
        "A RED [V] MUG AND A CAT", "a mug_of_tea, __init", "a < b > c", "(anti)-war poster", "{a}", "",
        "a breakfast and sand", "5 (4.5)",
    ],
)  # fmt: skip
def test_ordinary_text_is_not_warned_of(prompt):
    assert advice([prompt]) == []


def test_each_kind_is_said_once_whatever_prompt_has_it():
    assert len(advice(["a (red:1.3) mug", "a (blue:1.2), (old:1.1) mug BREAK", "(bad:2)"])) == 2


@pytest.mark.parametrize("mark", ["(", "[", "<", "{", "<lora:", "(a:", "__", "{|", "\\", "((", "(a)", ":1"])
def test_a_hostile_prompt_is_read_at_once(mark):
    advice([mark * 10_000])


def test_the_file_of_a_lora_is_quoted_for_the_shell():
    [line] = advice(["<lora:$(rm -r x)'s:1>"])
    assert shlex.split(line.partition(" given as ")[2])[1] == "$(rm -r x)'s.safetensors"


def test_a_call_warns_once_however_many_branches_and_pictures(pretend, photos, caplog):
    with Runtime.open(pretend, "fake") as runtime:
        runtime.generate("a (red:1.3) [V] robot", runtime.personalize(photos), n=3, negative_prompt="(bad:2)")
    [line] = [message for message in caplog.messages if "drawn as text" in message]
    assert line.startswith("(red:1.3) is drawn as text: words have no weights here")


def test_a_command_warns_once_and_as_an_event(run):
    _, out, err = run("generate", "-p", "a red robot BREAK", "-n", 3, "--json")
    warnings = [event["message"] for event in events(out) if event["event"] == "warning"]
    assert len(warnings) == 1 and warnings[0].startswith("BREAK is drawn as text") and err == ""
    err = run("generate", "-p", "a red robot BREAK", "-n", 3)[2]
    assert err.count("warning: BREAK is drawn as text") == 1
