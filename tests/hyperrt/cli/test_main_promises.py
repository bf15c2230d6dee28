"""What SECURITY.md and the README say of every command, and of what a picture carries."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from PIL import Image

from hyperrt.cli.commands import hyperrt as group
from hyperrt.cli.training import COMMANDS
from hyperrt.sampling import recipe
from tests.hyperrt.command_line import PROMPT

# Every key that a recipe may have.  A new one must say nothing of the user, the machine or the photos.
KEYS = {
    "backend", "base_model", "branches", "bundle", "cfg", "class_noun", "combine", "generic_prompt",
    "guidance_scale", "hypernet", "image_scale", "kappa", "negative_prompt", "photos", "prompt", "schema",
    "seed", "size", "solver", "steps", "strength", "subject_prompt", "subject_sha256", "version",
}  # fmt: skip


@pytest.fixture
def photo_with_position(tmp_path):
    """A photo whose EXIF has a GPS position, with the name of a place in it."""
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 22.0, 41.5), 27: b"ASCII\0\0\0HERE-I-LIVE"})
    path = tmp_path / "photo.jpg"
    Image.effect_noise((48, 40), 60).convert("RGB").save(path, exif=exif)
    assert b"HERE-I-LIVE" in path.read_bytes()
    return path


def test_no_position_of_a_photo_reaches_a_subject_file_or_a_picture(run, photo_with_position):
    assert run("personalize", "-i", photo_with_position, "-o", "robot.safetensors")[0] == 0
    assert run("generate", "-i", photo_with_position, "-p", PROMPT, "-o", "a.png")[0] == 0
    with Image.open("a.png") as picture:
        assert not picture.getexif()
    for name in ("robot.safetensors", "a.png"):
        assert b"HERE-I-LIVE" not in Path(name).read_bytes()


@pytest.mark.parametrize("more", [[], ["--cfg"], ["--negative-prompt", "red", "--combine", "product"]])
def test_a_recipe_has_known_keys_and_no_others(run, photos, more):
    assert run("generate", "-i", photos, "-p", PROMPT, "-o", "a.png", *more)[0] == 0
    assert recipe.read("a.png").keys() <= KEYS


def commands(command, words=()):
    """(words, command) of every command below a group."""
    if not isinstance(command, click.Group):
        yield " ".join(words), command
        return
    for name, child in command.commands.items():
        yield from commands(child, (*words, name))


def test_every_command_but_the_four_of_training_takes_json():
    without = {
        words
        for words, command in commands(group)
        if "--json" not in {name for parameter in command.params for name in parameter.opts}
    }
    assert without == set(COMMANDS) == {"pretrain", "prepare", "train", "evaluate"}
