"""Photos in every form: what is read and what is left out."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperrt.errors import BadImage, BadInput, NotFound
from hyperrt.photos import read
from hyperrt.photos.load import load_image
from tests.hyperrt.pictures import half_and_half

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    return path


def test_folders_files_arrays_and_images_are_photos(photos):
    array = np.zeros((40, 40, 3), np.uint8)
    found = read.read_photos([photos, photos / "photo 0.png", array, half_and_half()])
    assert len(found) == 6
    assert all(photo.dtype == np.uint8 and photo.shape[2:] == (3,) for photo in found)


@pytest.mark.parametrize("kind", ["folder", "text", "file", "array", "image"])
def test_one_photo_or_folder_needs_no_list(photos, kind):
    single = {
        "folder": photos,
        "text": str(photos / "photo 1.png"),
        "file": photos / "photo 1.png",
        "array": np.zeros((40, 40, 3), np.uint8),
        "image": half_and_half(),
    }[kind]
    assert len(read.read_photos(single)) == (3 if kind == "folder" else 1)


def test_a_bad_photo_among_good_ones_is_left_out_and_said(photos, broken, caplog):
    with caplog.at_level(logging.WARNING, "hyperrt"):
        assert len(read.read_photos([photos, broken])) == 3
    [message] = caplog.messages
    assert message.startswith("left out ") and "broken.png" in message and "damaged" in message


def test_strict_refuses_the_bad_photo(photos, broken):
    with pytest.raises(BadImage, match=r"broken\.png"):
        read.read_photos([photos, broken], strict=True)


def test_many_bad_photos_are_said_in_few_lines(tmp_path, caplog):
    half_and_half().save(tmp_path / "good.png")
    for number in range(read.MAX_WARNINGS + 5):
        (tmp_path / f"{number}.png").touch()
    with caplog.at_level(logging.WARNING, "hyperrt"):
        assert len(read.read_photos(tmp_path)) == 1
    assert len(caplog.messages) == read.MAX_WARNINGS + 1
    assert caplog.messages[-1] == "left out 5 more photos"


def test_the_only_photo_is_refused_with_its_own_reason(broken):
    with pytest.raises(BadImage, match=r"broken\.png"):
        read.read_photos(broken)


def test_when_no_photo_is_left_all_are_counted(broken):
    with pytest.raises(BadInput, match=r"none of the 2 photos could be used\n.*broken\.png: "):
        read.read_photos([broken, np.zeros((2, 2, 3), np.uint8)])


def test_no_photos_are_refused():
    with pytest.raises(BadInput, match="no photos were given"):
        read.read_photos([])


@pytest.mark.parametrize("kind", ["generator", "set", "files", "contents", "array"])
def test_photos_come_in_whatever_holds_them(photos, kind):
    paths = sorted(photos.iterdir())
    several = {
        "generator": (path for path in paths),
        "set": set(map(str, paths)),
        "files": [io.BytesIO(path.read_bytes()) for path in paths],
        "contents": [path.read_bytes() for path in paths],
        "array": np.stack([load_image(path) for path in paths]),
    }[kind]
    found = read.read_photos(several)
    assert np.array_equal(found, read.read_photos(photos))


def test_an_open_file_and_its_contents_are_one_photo(photos):
    file = io.BytesIO()
    half_and_half().save(file, "PNG")  # which leaves it at its end
    assert len(read.read_photos(file)) == 1
    assert len(read.read_photos(file.getvalue())) == 1
    with open(photos / "photo 0.png", "rb") as opened:
        assert len(read.read_photos(opened)) == 1


@pytest.mark.parametrize(
    "wrong",
    [None, 7, 2.5, [7], {"a": 1}.values(), io.StringIO("text"), io.BytesIO(), b"", b"text", np.zeros(3)],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_is_no_photo_is_refused_in_three_lines(wrong):
    with pytest.raises(BadInput) as caught:
        read.read_photos(wrong)
    assert len(str(caught.value).splitlines()) == 3


def test_a_closed_file_is_refused_in_three_lines():
    file = io.BytesIO(b"photo")
    file.close()
    with pytest.raises(BadImage, match=r"'photo 1'\n.*closed file\.?\n.*'rb'"):
        read.read_photos([file])


@pytest.mark.parametrize(
    "empty",
    [[], set(), iter(()), np.zeros((0, 40, 40, 3), np.uint8)],
    ids=lambda empty: type(empty).__name__,
)
def test_nothing_holds_no_photos(empty):
    with pytest.raises(BadInput, match="no photos were given"):
        read.read_photos(empty)


def test_a_bad_photo_without_a_name_is_told_by_its_place(caplog):
    read.read_photos([half_and_half(), np.zeros((2, 2, 3), np.uint8)])
    assert caplog.messages[0].startswith("left out photo 2: it has 2 x 2 pixels")


# Blank photos


def blank(kind: str) -> Image.Image:
    rng = np.random.default_rng(0)
    if kind == "lens cap":
        return Image.fromarray(rng.normal(4, 10, (300, 400, 3)).clip(0, 255).astype(np.uint8))
    if kind == "white sheet":  # a seventh darker in its corners
        y, x = np.mgrid[-1:1:300j, -1:1:400j]
        sheet = 225 * (1 - 0.075 * (x**2 + y**2)) + rng.normal(0, 4, (300, 400))
        return Image.fromarray(sheet.clip(0, 255).astype(np.uint8))
    return Image.new("RGBA", (40, 40), (255, 0, 0, 0)) if kind == "clear" else Image.new("RGB", (40, 40))


@pytest.mark.parametrize("kind", ["lens cap", "white sheet", "clear", "black"])
def test_a_blank_photo_is_used_with_a_warning_that_names_it(kind, photos, tmp_path, caplog):
    blank(kind).save(tmp_path / "blank.png")
    assert len(read.read_photos([photos, tmp_path / "blank.png"])) == 4
    [message] = caplog.messages
    assert "blank.png shows no subject" in message


def test_a_blank_photo_is_found_in_a_folder_and_in_memory(tmp_path, caplog):
    blank("black").save(tmp_path / "blank.png")
    read.read_photos(tmp_path)
    read.read_photos([half_and_half(), np.zeros((40, 40, 3), np.uint8)])
    assert [message.split(" shows")[0] for message in caplog.messages] == ["blank.png", "photo 2"]


def test_a_small_or_pale_subject_on_white_is_not_blank(caplog):
    small, pale = np.full((2, 100, 100, 3), 255, np.uint8)
    small[45:55, 45:55] = 128
    pale[30:75, 30:75] = 225
    read.read_photos([small, pale])
    assert not caplog.messages


def test_no_photo_of_the_examples_is_blank(caplog):
    folders = [path for path in (ROOT / "examples" / "subjects").iterdir() if path.is_dir()]
    assert len(read.read_photos(folders)) > len(folders) > 1
    assert not caplog.messages


@pytest.mark.parametrize("name", ["gone", "gone.png"])
def test_a_name_of_nothing_is_not_found(tmp_path, name):
    with pytest.raises(NotFound, match=name):
        read.read_photos(tmp_path / name)


def test_a_name_that_is_too_long_is_a_bad_photo(tmp_path):
    with pytest.raises(BadImage, match="too long"):
        read.read_photos(tmp_path / ("x" * 300))
