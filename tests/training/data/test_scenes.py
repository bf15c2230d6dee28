from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from hyperrt.training.data import backgrounds, scenes

SIZE = 32
WHITE = "on a plain white background"
INDICES = range(40)

PRINT_HASH = """
import hashlib, numpy
from hyperrt.training.data import scenes
who = scenes.drawn_subject("fish", "test", 3)
picture = scenes.scene(who, "in a city", numpy.random.default_rng(5), 32)
print(hashlib.sha256(picture.tobytes()).hexdigest())
"""


def picture(noun="fish", split="test", index=3, background="in a city", seed=5):
    return scenes.scene(
        scenes.drawn_subject(noun, split, index), background, np.random.default_rng(seed), SIZE
    )


def test_there_are_eight_nouns_and_twelve_scenes():
    assert len(scenes.NOUNS) >= 8
    assert len(scenes.BACKGROUNDS) >= 12
    assert WHITE in scenes.BACKGROUNDS


def test_no_subject_is_in_two_splits():
    subjects = {
        split: {scenes.drawn_subject(noun, split, index) for noun in scenes.NOUNS for index in INDICES}
        for split in scenes.SPLIT_SEEDS
    }
    assert {len(of_split) for of_split in subjects.values()} == {len(scenes.NOUNS) * len(INDICES)}
    assert len(set.union(*subjects.values())) == len(subjects) * len(scenes.NOUNS) * len(INDICES)


def test_the_same_arguments_draw_the_same_picture_in_another_process():
    result = subprocess.run([sys.executable, "-c", PRINT_HASH], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == hashlib.sha256(picture().tobytes()).hexdigest()


@pytest.mark.parametrize(
    "changed",
    [{"noun": "bird"}, {"split": "train"}, {"index": 4}, {"background": WHITE}, {"seed": 6}],
    ids=str,
)
def test_another_argument_draws_another_picture(changed):
    assert (picture(**changed) != picture()).any()


def test_a_caption_depends_only_on_noun_scene_and_token():
    assert scenes.caption("fish", WHITE) == "a fish on a plain white background"
    assert scenes.caption("fish", WHITE, "sks") == "a sks fish on a plain white background"
    words = {
        word
        for noun in scenes.NOUNS
        for place in scenes.BACKGROUNDS
        for word in scenes.caption(noun, place).split()
    }
    assert not words & ({*scenes.PATTERNS, "striped", "dotted", "checked"} - {"plain"})
    assert all("plain" not in scenes.caption(noun, "") for noun in scenes.NOUNS)


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((255, 0, 0), "red"),
        ((255, 10, 10), "red"),
        ((255, 0, 20), "red"),  # a hue just below the whole circle
        ((120, 0, 0), "dark red"),
        ((230, 110, 110), "pale red"),
        ((0, 0, 240), "blue"),
        ((20, 20, 30), "black"),
        ((128, 128, 120), "grey"),
        ((250, 250, 250), "white"),
    ],
    ids=str,
)
def test_a_colour_has_a_name(colour, name):
    assert scenes.colour_name(colour) == name


def test_a_description_names_colours_and_pattern():
    palette = ((255, 0, 0), (0, 120, 0), (0, 0, 240))
    who = scenes.DrawnSubject("fish", palette, "dots", repeats=4, angle=0, parts=(0.5,) * 8)
    assert scenes.describe(who) == "red fish with dark green dots and blue details"
    plain = dataclasses.replace(who, pattern="plain", palette=(*palette[:2], palette[0]))
    assert scenes.describe(plain) == "red fish with dark green parts and red details"


def test_a_caption_begins_with_the_article_of_its_first_word():
    assert scenes.caption("orange fish with red dots", WHITE).startswith("an orange fish ")
    assert scenes.caption("orange fish", WHITE, "sks").startswith("a sks orange fish ")


@pytest.mark.parametrize("noun", scenes.NOUNS)
def test_a_subject_fills_its_picture_with_clean_edges(noun):
    for index in range(5):
        who = scenes.drawn_subject(noun, "test", index)
        alpha = np.asarray(scenes.draw_subject(who, 64))[..., 3]
        rows, columns = (np.flatnonzero(alpha.max(axis)) for axis in (1, 0))
        assert 0.2 < (alpha > 0).mean() < 0.9
        assert max(np.ptp(rows), np.ptp(columns)) > 40
        assert len(np.unique(alpha)) > 4  # anti-aliased


def test_a_subject_shows_its_palette():
    who = scenes.drawn_subject("monster", "test", 1)
    drawn = np.asarray(scenes.draw_subject(who, 64))
    for colour in who.palette[:1]:
        assert (drawn[..., :3] == colour).all(-1).sum() > 50


def test_views_of_a_subject_differ_in_place_and_size_only_a_little():
    who = scenes.drawn_subject("mug", "test", 0)
    views = [scenes.scene(who, WHITE, np.random.default_rng(seed), 64) for seed in range(4)]
    centres = [np.argwhere((view != 255).any(-1)).mean(0) for view in views]
    assert (views[0] != views[1]).any()
    assert np.ptp(centres, axis=0).max() < 0.2 * 64


@pytest.mark.parametrize("name", backgrounds.SCENES)
def test_a_scene_has_the_requested_size(name):
    scene = backgrounds.draw(name, 24, np.random.default_rng(0))
    assert (scene.size, scene.mode) == ((24, 24), "RGB")


def test_scenes_differ_in_colour_or_texture():
    drawn = [
        np.asarray(backgrounds.draw(name, 24, np.random.default_rng(0)), float) for name in backgrounds.SCENES
    ]
    for k, one in enumerate(drawn):
        assert all(np.abs(one - other).mean() > 8 for other in drawn[k + 1 :])


def test_plain_scenes_have_one_colour():
    names = [name for name in backgrounds.SCENES if "plain" in name]
    assert names
    for name in names:
        scene = np.asarray(backgrounds.draw(name, 16, np.random.default_rng(0)))
        assert (scene == scene[0, 0]).all()
