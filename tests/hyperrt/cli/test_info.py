"""What `hyperrt info` prints: facts of bundles, pictures and subject files, of which none is trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hyperrt.bundle.bundle import Bundle
from hyperrt.cli import info, main
from hyperrt.sampling import recipe
from tests.hyperrt import fake_bundle
from tests.hyperrt.command_line import events, is_three_lines

pytestmark = pytest.mark.usefixtures("alone")
HOSTILE = "\x1b[2J\x07\x9b31m\u202e\udc80\nkind: bundle\r"
HARMLESS = r"\x1b[2J\x07\x9b31m\u202e\udc80\nkind: bundle\r"


def test_a_subject_file_says_what_it_is(subject_file, capsys):
    code = main.run(["info", str(subject_file)])
    out = capsys.readouterr().out
    assert code == 0
    assert "kind: subject" in out and "class_noun: robot" in out and fake_bundle.BASE_MODEL in out


def test_a_peft_folder_is_a_subject(run, photos, capsys):
    run("personalize", "-i", photos, "-o", "robot", "--format", "peft")
    main.run(["info", "robot", "--json"])
    found = events(capsys.readouterr().out)[-1]
    assert (found["kind"], found["format"], found["finite"]) == ("subject", "peft", True)


def test_a_picture_gives_its_recipe(run, capsys):
    run("generate", "-p", "a robot", "--seed", 7, "-o", "a.png")
    main.run(["info", "a.png", "--json"])
    assert events(capsys.readouterr().out)[-1]["recipe"]["seed"] == 7


def test_a_bundle_says_what_it_is(pretend, capsys):
    assert main.run(["info", str(pretend)]) == 0
    out = capsys.readouterr().out
    assert "kind: bundle" in out and "default" in out and "robot" in out


def test_a_bundle_lists_its_sites_with_their_sizes(pretend, capsys):
    assert main.run(["info", str(pretend), "--json"]) == 0
    sites = events(capsys.readouterr().out)[-1]["sites"]
    assert sites == {site.path: f"{site.d_in} to {site.d_out}" for site in Bundle.open(pretend).layout.sites}


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("x.png", b"\x89PNG\r\n\x1a\n", 3),
        ("x.safetensors", b"short", 3),
        ("x.txt", b"hello", 3),
        ("nowhere", None, 4),
        ("x" * 300, None, 4),
    ],
    ids=["PNG", "subject", "text", "missing", "long name"],
)
def test_what_cannot_be_read_is_refused(capsys, name, content, code):
    if content is not None:
        Path(name).write_bytes(content)
    assert main.run(["info", name]) == code
    assert is_three_lines(capsys.readouterr().err)


def test_a_device_is_refused_unread(capsys):
    assert main.run(["info", "/dev/zero"]) == 3
    assert "not a plain file" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["value", "name", "nested", "list"])
def test_no_text_of_a_file_is_a_command_to_the_terminal_or_a_line_of_its_own(place):
    facts = {
        "value": {"prompt": HOSTILE},
        "name": {HOSTILE: 1},
        "nested": {"recipe": {HOSTILE: {HOSTILE: HOSTILE}}},
        "list": {"nouns": [HOSTILE]},
    }[place]
    text = info.text(facts)
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text.split("\n")) == (3 if place == "nested" else 1)
    assert place == "list" or HARMLESS in text


def test_a_hostile_recipe_is_printed_harmlessly(capsys):
    image = np.zeros((8, 8, 3), np.uint8)
    recipe.save_png("a.png", image, {"prompt": HOSTILE.replace("\udc80", ""), "\x1b]0;": "é\x1b"})
    assert main.run(["info", "a.png"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x9b" not in out and r"\x1b]0;: é\x1b" in out


def test_a_long_value_is_cut():
    [line] = info.text({"prompt": "x" * 10_000}).split("\n")
    assert len(line) < 500 and line.endswith("…")
