"""Every picture has its path before it is drawn, and no picture takes the name of another."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pytest

from hyperrt.cli.picture_files import save, targets, words
from hyperrt.errors import NotFound, UsageError

PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def paths_of(*arguments, **options):
    return [target.path for target in targets(*arguments, **options)]


@pytest.mark.parametrize(
    ("output", "seeds", "paths"),
    [
        (None, [3], ["a-v-mug-on-the-moon-3.png"]),
        (".", [3], ["a-v-mug-on-the-moon-3.png"]),
        ("x.png", [3], ["x.png"]),
        ("X.PNG", [3], ["X.PNG"]),
        ("x.png", [3, 4], ["x-3.png", "x-4.png"]),
        ("new", [3, 4], ["new/a-v-mug-on-the-moon-3.png", "new/a-v-mug-on-the-moon-4.png"]),
        ("new/er", [3], ["new/er/a-v-mug-on-the-moon-3.png"]),
        ("v1.5/", [3], ["v1.5/a-v-mug-on-the-moon-3.png"]),
    ],
)
def test_every_picture_has_a_path(output, seeds, paths):
    found = paths_of(output, "A [V] mug, on the Moon!", seeds)
    assert [path.as_posix() for path in found] == paths
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("日本の猫", "日本の猫"),
        ("قطة على الشاطئ", "قطة-على-الشاطئ"),
        ("हिन्दी बिल्ली", "हिन्दी-बिल्ली"),
        ("Cafe\u0301 ÉTÉ №5", "café-été-5"),
        ("🐱 👨‍👩‍👧 ❤\ufe0f", "picture"),
        ("\u3164 \u202e\u200f\u0301", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("-.a\0b\nc\\d:e\udc80", "a-b-c-d-e"),
        ("x" * 500, "x" * 60),
        ("𝒳" * 100, "𝒳" * 50),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_a_prompt_of_any_script_makes_a_name_that_every_file_system_takes(prompt, name):
    assert words(prompt) == name
    [path] = paths_of(None, prompt, [2**32 - 1])
    assert len(os.fsencode(path.name)) <= 255 and path.name[0] not in "-."
    path.touch()


@pytest.mark.parametrize("prompt", ["CON", "nul", "COM1", "lpt¹"])
def test_no_name_is_one_that_windows_keeps_for_itself(prompt):
    [path] = paths_of(None, prompt, [0])
    assert path.name.split(".")[0].upper() == f"{prompt.upper()}-0"


def test_in_a_folder_a_free_number_is_taken_and_force_takes_the_name():
    for name in ("a-mug-1.png", "a-mug-1-2.png", "a-mug-2.png"):
        Path(name).touch()
    Path("a-mug-2-2.png").symlink_to("nowhere")
    found = paths_of(None, "a mug", [0, 1, 2])
    assert [path.name for path in found] == ["a-mug-0.png", "a-mug-1-3.png", "a-mug-2-3.png"]
    assert [path.name for path in paths_of(None, "a mug", [1], force=True)] == ["a-mug-1.png"]


def test_a_name_that_was_taken_since_gets_the_next_number():
    [target] = targets("new", "a mug", [1])
    Path("new").mkdir()
    for name in ("a-mug-1.png", "a-mug-1-2.png"):
        (Path("new") / name).touch()
    assert save(target, PICTURE, {}) == Path("new/a-mug-1-3.png")
    assert save(target, PICTURE, {}, force=True) == Path("new/a-mug-1.png")
    assert (Path("new/a-mug-1-2.png")).stat().st_size == 0


def test_a_file_that_the_user_named_gets_no_number():
    [target] = targets("a.png", "a mug", [1])
    Path("a.png").touch()
    with pytest.raises(UsageError, match="exists"):
        save(target, PICTURE, {})


def test_what_to_write_instead_can_be_pasted():
    for output in ("my pictures", "my $(x).jpg"):
        Path("my pictures").touch()
        with pytest.raises(UsageError) as caught:
            targets(output, "a mug", [0])
        _, option, name = shlex.split(caught.value.do)
        assert option == "-o" and targets(name, "a mug", [0])


@pytest.mark.parametrize(
    ("output", "error", "words"),
    [
        ("x.jpg", UsageError, "use -o x.png"),
        ("no/x.png", NotFound, "does not exist"),
        ("file", UsageError, "not a folder"),
        ("file/x.png", UsageError, "not a folder"),
        ("taken.png", UsageError, "--force"),
        ("y" * 300, UsageError, "too long"),
        ("y" * 300 + ".png", UsageError, "too long"),
    ],
)
def test_where_nothing_can_be_written_is_known_before_the_work(output, error, words):
    Path("file").touch()
    Path("taken.png").touch()
    with pytest.raises(error) as caught:
        paths_of(output, "a robot", [0])
    assert words in str(caught.value)


def test_force_replaces_files_but_no_folders():
    Path("taken.png").touch()
    Path("folder-1.png").mkdir()
    assert paths_of("taken.png", "a robot", [0], force=True) == [Path("taken.png")]
    with pytest.raises(UsageError, match="is a folder"):
        paths_of("folder.png", "a robot", [0, 1], force=True)
