from __future__ import annotations

import colorsys
import os

import numpy as np
import pytest
from PIL import Image

from hyperrt.errors import BadInput, NotFound
from hyperrt.training.data import cutouts, scenes

COLOURS = ("red", "green", "blue", "orange", "purple", "yellow")


@pytest.fixture
def folder(tmp_path, cutout_folder):
    return cutout_folder(tmp_path / "cutouts", [(colour, "toy") for colour in COLOURS])


def colour_of(picture):
    """Mean colour of the opaque pixels, as hue, saturation, value in [0, 1]."""
    pixels = np.asarray(picture)
    red, green, blue = pixels[pixels[..., 3] == 255][:, :3].mean(0) / 255
    return np.array(colorsys.rgb_to_hsv(red, green, blue))


def test_a_table_gives_nouns_family_and_split(tmp_path, cutout_folder):
    folder = cutout_folder(tmp_path, [(c, "toy") for c in COLOURS[:4]], table=False)
    table = ["file,class_noun,family,split", "red.png,Toy,core,train", "green.png,,core,train",
             "blue.png,toy,face,train", "orange.png,toy,core,test"]  # fmt: skip
    (folder / "metadata.csv").write_text("\n".join(table))
    train, test = cutouts.load(folder), cutouts.load(folder, "test")
    assert [(file.name, noun) for file, noun in zip(train.files, train.nouns, strict=True)] == [
        ("red.png", "toy"),
        ("green.png", "thing"),
    ]
    assert [file.name for file in test.files] == ["orange.png"]


def test_a_table_may_begin_with_a_byte_order_mark(tmp_path, cutout_folder):
    folder = cutout_folder(tmp_path, [("red", "")], table=False)
    table = "file,class_noun,split\nred.png,toy,train\n"
    (folder / "metadata.csv").write_text(table, encoding="utf-8-sig")
    assert cutouts.load(folder).nouns == ("toy",)


def test_without_a_table_every_picture_is_a_thing_and_in_one_split(tmp_path, cutout_folder):
    colours = [f"#{level:02x}8040" for level in range(0, 256, 16)]
    folder = cutout_folder(tmp_path, [(colour, "") for colour in colours], table=False)
    found = [cutouts.load(folder, split) for split in ("train", "test")]
    assert {noun for split in found for noun in split.nouns} == {"thing"}
    names = [file.name for split in found for file in split.files]
    assert sorted(names) == sorted(f"{colour}.png" for colour in colours)


@pytest.mark.parametrize("noun", ["a, striped; one", "x" * 100, "two\nlines", "one two three four"])
def test_a_noun_that_is_not_plain_words_is_a_thing(tmp_path, cutout_folder, noun):
    folder = cutout_folder(tmp_path, [("red", "")], table=False)
    (folder / "metadata.csv").write_text(f'file,class_noun\nred.png,"{noun}"\n')
    found = [
        cutouts.load(folder, split) for split in ("train", "test") if cutouts._split_of("red.png") == split
    ]
    assert found[0].nouns == ("thing",)


def test_a_subject_is_an_rgba_square_filled_by_the_opaque_part(folder):
    picture = cutouts.load(folder).subject(0, 32)
    assert (picture.size, picture.mode) == ((32, 32), "RGBA")
    rows, columns = (np.flatnonzero(np.asarray(picture)[..., 3].max(axis)) for axis in (1, 0))
    assert (np.ptp(rows), np.ptp(columns)) == (31, 15)  # the files hold a shape twice as high as wide


def test_the_first_round_keeps_the_hues_and_later_ones_turn_them(folder):
    found = cutouts.load(folder)
    first, second, third = (found.subject(k * len(found.files), 32) for k in range(3))
    before, after = colour_of(first), colour_of(second)
    assert before[0] == pytest.approx(0, abs=0.01)  # red
    assert 0.08 < after[0] < 0.92
    np.testing.assert_allclose(after[1:], before[1:], atol=0.03)
    assert (np.asarray(second) != np.asarray(third)).any()
    assert (np.asarray(second)[..., 3] == np.asarray(first)[..., 3]).all()
    assert found.noun(len(found.files)) == found.noun(0)


def test_a_subject_is_always_the_same(folder):
    index = 3 * len(COLOURS) + 1
    one, other = (np.asarray(cutouts.load(folder).subject(index, 32)) for _ in range(2))
    assert np.array_equal(one, other)


def test_a_description_has_the_colours_that_a_picture_shows(folder):
    found = cutouts.load(folder)
    for index in range(2 * len(found.files)):
        levels = 255 * np.array(colorsys.hsv_to_rgb(*colour_of(found.subject(index, 32))))
        shown = scenes.colour_name(tuple(levels.round().astype(int).tolist()))
        assert found.describe(index) == f"{shown} {found.noun(index)}"


def test_a_nearly_transparent_subject_is_described_by_its_noun(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 60)).save(tmp_path / "veil.png")
    found = cutouts.Cutouts("train", (tmp_path / "veil.png",), ("veil",), {})
    assert found.describe(0) == "veil"


def test_bad_files_are_left_out_counted_and_named(tmp_path, cutout_folder, caplog):
    bad = ["broken.png", "opaque.png", "clear.png", "absent.png", "../red.png", "pipe.png", "text.png"]
    folder = cutout_folder(
        tmp_path / "cutouts", [("red", "toy"), *((name, "toy") for name in bad)], colours=1
    )
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:60])
    Image.new("RGB", (40, 40), "red").save(folder / "opaque.png")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(folder / "clear.png")
    (folder.parent / "red.png").write_bytes((folder / "red.png").read_bytes())
    (folder / "text.png").write_text("no picture")
    os.mkfifo(folder / "pipe.png")
    found = cutouts.load(folder)
    assert [file.name for file in found.files] == ["red.png"]
    assert set(found.skipped) == set(bad)
    assert found.skipped["opaque.png"] == "nothing in it is transparent"
    assert found.skipped["clear.png"] == "nothing in it is opaque"
    assert found.skipped["../red.png"] == "it lies outside the folder"
    assert caplog.text.count("7 of 8 cut-outs are left out: broken.png (") == 1


def test_a_picture_of_too_many_pixels_is_left_out(folder, monkeypatch):
    monkeypatch.setattr(cutouts, "MAX_PIXELS", 100)
    with pytest.raises(BadInput, match="more than 100"):
        cutouts.load(folder)


def test_a_missing_folder_or_one_without_cutouts_is_refused(tmp_path):
    with pytest.raises(NotFound, match="there is no folder"):
        cutouts.load(tmp_path / "absent")
    with pytest.raises(BadInput, match="has no cut-outs"):
        cutouts.load(tmp_path)
    (tmp_path / "metadata.csv").write_text("name,class_noun\na.png,toy\n")
    with pytest.raises(BadInput, match="no column 'file'"):
        cutouts.load(tmp_path)


def test_the_shared_emoji_are_read_and_their_splits_are_disjoint(shared_data):
    train, test = (cutouts.load(shared_data / "fluent3d", split) for split in ("train", "test"))
    assert (len(train.files), len(test.files)) == (662, 85)
    assert not train.skipped
    assert not set(train.files) & set(test.files)
    assert "thing" not in train.nouns
