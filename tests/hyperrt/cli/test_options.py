"""Options of several commands; former names still work and are not in the help."""

from __future__ import annotations

import pytest

from hyperrt.cli.commands import hyperrt as group
from tests.hyperrt.command_line import PROMPT, is_three_lines

NEEDED = {
    "generate": ["-p", "a robot"],
    "personalize": ["-i", "photos", "-o", "a.safetensors"],
    "compile": [],
}


@pytest.mark.parametrize(
    ("command", "former", "name", "value"),
    [
        ("generate", "--n", "n", 2),
        ("generate", "--class", "class_noun", "mug"),
        ("generate", "--negative", "negative_prompt", "red"),
        ("personalize", "--class", "class_noun", "mug"),
        ("compile", "--images", "pictures", 4),
    ],
)
def test_a_former_name_still_works_and_is_not_in_the_help(run, command, former, name, value):
    context = group.commands[command].make_context(command, [*NEEDED[command], former, str(value)])
    assert context.params[name] == value
    assert f"{former} " not in run(command, "--help", here=())[1].partition("Options:")[2]


@pytest.mark.parametrize(("option", "first"), [("--imags", "--images"), ("--sed", "--seed")])
def test_the_closest_option_is_suggested_first(run, option, first):
    code, _, err = run("generate", option, "x")
    assert code == 2 and is_three_lines(err) and f"did you mean {first}" in err


@pytest.mark.parametrize("option", ["--prompt", "--subject"])
def test_a_second_prompt_or_subject_is_refused(run, option):
    code, _, err = run("generate", "-p", PROMPT, "-s", "a.safetensors", option, "b")
    assert code == 2 and is_three_lines(err) and f"{option} was given 2 times" in err
