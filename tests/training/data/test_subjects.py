from __future__ import annotations

import numpy as np
import pytest

from hyperrt.errors import BadImage, BadPrompt
from hyperrt.photos import formats, load
from hyperrt.training.data.subjects import DatasetSubject, View, captions_of_text, read
from tests.training.data_sets import drawn, encoded

CAPTIONS = ("a [V] toy", "a toy")


@pytest.mark.parametrize(
    ("text", "noun", "subject", "generic"),
    [
        ("The Red Chair stands here", "red chair", "The [V] Red Chair stands here", None),
        ("a cat sees a cat", "cat", "a [V] cat sees a cat", None),
        ("many cats", "cat", "a [V] cat, many cats", None),
        ("on a beach", "C-3PO (toy)", "a [V] C-3PO (toy), on a beach", None),
        ("a [v] cat in snow", "cat", "a [V] cat in snow", "a cat in snow"),
        ("a [V] on a hill", "dog", "a [V] dog on a hill", "a dog on a hill"),
        ("  a \n cat ", "cat", "a [V] cat", "a cat"),
    ],
)
def test_the_placeholder_goes_before_the_noun_or_before_the_text(text, noun, subject, generic):
    assert captions_of_text(text, noun) == (subject, generic or text)


@pytest.mark.parametrize("text", ["", "no noun", "bell \a", "x" * 20_000])
def test_an_unusable_caption_is_refused(text):
    with pytest.raises(BadPrompt):
        captions_of_text(text, "" if text == "no noun" else "cat")


def test_a_photo_becomes_the_square_in_its_middle(tmp_path):
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 200
    (tmp_path / "wide.png").write_bytes(encoded(wide))
    found = read(DatasetSubject("toy", (View("wide", tmp_path / "wide.png", CAPTIONS),)), 40)
    assert found.images.shape == (1, 40, 40, 3)
    assert (found.images[0, :, 2:-2] == 200).all()


def test_a_jpeg_of_too_many_pixels_is_decoded_at_a_smaller_scale_unless_it_is_cut(monkeypatch):
    monkeypatch.setattr(formats, "MAX_PIXELS", 100 * 100)
    monkeypatch.setattr(load, "KEEP_SIDE", 0)
    large = encoded(next(drawn(1, 400)), "JPEG")
    views = (View("large", large, CAPTIONS), View("cut", large, CAPTIONS, lambda picture: picture[:300]))
    result = read(DatasetSubject("toy", views[:1]), 64)
    assert result.images.shape == (1, 64, 64, 3)
    [left_out] = read(DatasetSubject("toy", views[1:]), 64).left_out
    assert "400 x 400 pixels" in left_out.why


def test_unusable_photos_are_left_out_and_the_others_kept(tmp_path):
    one, other = (encoded(picture) for picture in drawn(2))

    def refuse(_):
        raise BadImage("x", "it is cut wrongly")

    views = (
        View("broken", one[:100], ("a", "b")),
        View("good", one, CAPTIONS),
        View("again", bytes(bytearray(one)), ("a", "b")),
        View("cut", other, ("a", "b"), refuse),
        View("absent", tmp_path / "absent.png", ("a", "b")),
    )
    found = read(DatasetSubject("toy", views), 64)
    assert found.captions == [CAPTIONS]
    assert len(found.images) == 1
    assert {item.name: item.bad for item in found.left_out} == dict.fromkeys(
        ("broken", "again", "cut", "absent"), True
    )
    assert "the same picture as good" in found.left_out[1].why


def test_a_picture_that_views_share_is_drawn_once():
    calls = []

    def draw():
        calls.append(1)
        return np.stack(list(drawn(2, 16)))

    views = tuple(View(str(k), draw, CAPTIONS, lambda pictures, k=k: pictures[k]) for k in (0, 1))
    assert len(read(DatasetSubject("toy", views), 16).images) == 2
    assert len(calls) == 1
