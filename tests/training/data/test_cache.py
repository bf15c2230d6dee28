from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hyperrt.errors import UsageError
from hyperrt.training.data import cache as data
from hyperrt.training.data import clip_tokenizer, cutouts, scenes

SIZE, VIEWS = 16, 3


@pytest.fixture
def small(tmp_path):
    return data.build(tmp_path / "cache", 24, VIEWS, SIZE, workers=1)


@pytest.fixture
def folder(tmp_path, cutout_folder):
    return cutout_folder(tmp_path / "cutouts", [("red", "toy animal"), ("green", "fish"), ("blue", "")])


def contents(cache):
    return SimpleNamespace(**{name: np.array(getattr(cache, name)) for name in ("images", "nouns", "texts")})


def same(one, other):
    return all(np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(one))


def test_a_cache_has_the_shapes_of_its_documentation(small):
    assert small.images.shape == (24, VIEWS, SIZE, SIZE, 3)
    assert small.images.dtype == np.uint8
    assert (small.nouns == np.arange(24) % len(scenes.NOUNS)).all()
    assert all(len(set(row)) == VIEWS for row in small.texts)
    assert (small.counts == VIEWS).all()


def test_worker_processes_draw_what_one_process_draws(small, tmp_path):
    assert same(contents(small), contents(data.build(tmp_path / "other", 24, VIEWS, SIZE, workers=2)))


def test_a_finished_cache_is_kept(small):
    before = (small.path / "images.npy").stat().st_mtime_ns
    assert same(contents(data.build(small.path, 24, VIEWS, SIZE, workers=1)), contents(small))
    assert (small.path / "images.npy").stat().st_mtime_ns == before


def test_a_finished_cache_with_other_settings_is_kept_without_force(small):
    before = contents(small)
    with pytest.raises(UsageError, match="other settings: identities, views"):
        data.build(small.path, 25, VIEWS - 1, SIZE, workers=1)
    assert same(contents(data.PictureCache.open(small.path)), before)


def test_other_settings_or_an_unfinished_cache_are_drawn_again(small):
    expected = contents(small)
    (small.path / data.LATENTS).write_bytes(b"of the old pictures")
    other = data.build(small.path, 24, VIEWS, SIZE, split="test", workers=1, force=True)
    assert not same(contents(other), expected)
    assert not (small.path / data.LATENTS).exists()
    (small.path / data.METADATA).write_text('{"identities": 2')
    assert same(contents(data.build(small.path, 24, VIEWS, SIZE, workers=1)), expected)


def test_captions_name_noun_scene_and_token(small):
    places = np.load(small.path / "backgrounds.npy")
    noun, place = scenes.NOUNS[1], scenes.BACKGROUNDS[places[9, 2]]
    who, view = np.array([9]), np.array([2])
    assert small.captions(who, view) == [f"a {noun} {place}"]
    assert small.captions(who, view, "sks") == [f"a sks {noun} {place}"]


def test_described_captions_have_the_description_in_place_of_the_noun(folder, tmp_path):
    mixed = data.build(
        tmp_path / "mixed", 24, VIEWS, SIZE, workers=1, cutouts=cutouts.load(folder), share=0.5
    )
    who, view = (index.ravel() for index in np.indices(mixed.shape))
    for described, plain in zip(mixed.described(who, view), mixed.captions(who, view), strict=True):
        place = next(place for place in scenes.BACKGROUNDS if plain.endswith(place))
        noun = plain.removeprefix("a ").removesuffix(place).strip()
        assert described.endswith(place)
        assert noun in described
        assert len(described) > len(plain)
    drawn = next(k for k in range(24) if "details" in mixed.described(np.array([k]), np.array([0]))[0])
    who = scenes.drawn_subject(scenes.NOUNS[drawn % len(scenes.NOUNS)], "train", drawn)
    assert scenes.describe(who) in mixed.described(np.array([drawn]), np.array([0]))[0]


def test_a_cache_without_latents_or_metadata_is_refused(small):
    with pytest.raises(FileNotFoundError, match="has no latents yet"):
        _ = small.latents
    (small.path / data.METADATA).unlink()
    with pytest.raises(FileNotFoundError, match="not a finished picture cache"):
        data.PictureCache.open(small.path)


def test_a_cache_from_before_there_were_cutouts_is_read(small):
    assert set(json.loads((small.path / data.METADATA).read_text())) == {
        "identities",
        "views",
        "size",
        "split",
        "version",
    }
    assert small.names == scenes.NOUNS


def test_cutouts_take_their_share_and_leave_the_other_subjects_unchanged(small, folder, tmp_path):
    mixed = data.build(
        tmp_path / "mixed", 24, VIEWS, SIZE, workers=1, cutouts=cutouts.load(folder), share=0.5
    )
    changed = (np.asarray(mixed.images) != small.images).any((1, 2, 3, 4))
    assert 4 <= changed.sum() <= 20
    assert mixed.names == (*scenes.NOUNS, "thing", "toy animal")
    assert {mixed.names[k] for k in mixed.nouns[changed]} == {"fish", "thing", "toy animal"}
    assert (mixed.nouns[~changed] == small.nouns[~changed]).all()
    assert (
        data.PictureCache.open(mixed.path)
        .captions(np.array([int(np.argmax(mixed.nouns == 9))]), np.array([0]))[0]
        .startswith("a toy animal ")
    )


@pytest.mark.parametrize(("share", "drawn"), [(0.0, True), (1.0, False)])
def test_the_share_goes_from_none_to_all(small, folder, tmp_path, share, drawn):
    found = data.build(
        tmp_path / "mixed", 24, VIEWS, SIZE, workers=1, cutouts=cutouts.load(folder), share=share
    )
    same_pictures = (np.asarray(found.images) == small.images).all((1, 2, 3, 4))
    assert same_pictures.all() if drawn else not same_pictures.any()


def test_the_tokenizer_knows_the_words_of_a_caches_nouns(tmp_path):
    known = clip_tokenizer.build(tmp_path / "a", 24, (*scenes.NOUNS, "toy animal"))
    assert known.tokenize("a toy animal on a beach") == [
        f"{word}</w>" for word in ["a", "toy", "animal", "on", "a", "beach"]
    ]
