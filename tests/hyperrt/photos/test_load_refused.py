"""A file that is no usable photo is refused with a reason, before it can do harm; nothing else escapes."""

from __future__ import annotations

import contextlib
import csv
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image

from hyperrt.errors import BadImage, NotFound
from hyperrt.photos import formats, load
from tests.hyperrt.pictures import (
    encoded,
    half_and_half,
    load_bytes,
    noise,
    png_chunk,
    png_that_claims,
)

BAD_IMAGES = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "bad_images"
KINDS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if AvifImagePlugin.SUPPORTED else [])]


def rows() -> list[dict[str, str]]:
    if not BAD_IMAGES.is_dir():
        return []
    with open(BAD_IMAGES / "PROVENANCE.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", rows() or [None], ids=lambda row: row["file"] if row else "no shared data")
def test_every_file_of_the_collection_ends_as_its_row_asks(row, shared_data):
    wanted, path = row["suggested_outcome"], shared_data / "bad_images" / row["file"]
    try:
        picture = load.load_image(path)
    except BadImage as error:
        assert not wanted.startswith(("accept as RGB", "accept, upright"))
        assert wanted != "accept_first_frame_only"
        assert error.name == str(path)
        assert error.reason
        assert error.do
        assert len(str(error).splitlines()) == 3
    else:
        assert wanted.startswith(("accept", "either", "policy"))  # AVIF
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        assert min(picture.shape[:2]) >= formats.MIN_SIDE


def test_the_collection_as_a_folder_gives_its_first_good_photos_and_a_reason_for_each_bad_one(shared_data):
    photos = load.load_folder(shared_data / "bad_images")
    assert len(photos.images) == len(photos.names) == load.MAX_PHOTOS
    assert all(name and reason for name, reason in photos.rejected)
    assert "eps_timeout-d675703545fee17acab56e5fec644c19979175de.eps" in dict(photos.ignored)


# Files that the tests make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_file_that_ends_early_is_refused(kind, share, tmp_path):
    content = encoded(noise(), kind)
    with pytest.raises(BadImage, match=r"damaged|is not JPEG"):
        load_bytes(content[: int(len(content) * share)], tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"just text", "not JPEG, PNG"),
        (b"\x89PNG\r\n\x1a\n", "begins like PNG, but is damaged"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypavif", "begins like AVIF, but is damaged"),
        (b"8BPS\0\1", "it is Photoshop"),
        (b"%PDF-1.7", "it is PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "not JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is SVG"),
        (encoded(half_and_half((64, 64)), "PPM"), "not JPEG, PNG"),
        (encoded(half_and_half((64, 64)), "ICO"), "not JPEG, PNG"),
        (encoded(Image.new("F", (64, 64)), "TIFF"), "32 bits"),
    ],
    ids=["empty", "text", "signature", "heic", "avif", "psd", "pdf", "eps", "svg", "ppm", "ico", "float"],
)
def test_what_is_no_photo_is_refused_with_the_reason(content, reason, tmp_path):
    with pytest.raises(BadImage, match=reason) as caught:
        load_bytes(content, tmp_path)
    assert caught.value.do


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "1 x 1 pixels; each side needs at least 32"),
        ((31, 500), "31 x 500 pixels"),
        ((1, 16_000), "each side needs"),
        ((40, 900), "over 20 times the other"),
        ((20_000, 2_000), "at most 16,384 a side"),
        ((10_000, 10_000), "64 million"),
        ((100_000, 100_000), "64 million"),
        ((2**31 - 1, 2**31 - 1), "64 million"),
    ],
    ids=str,
)
def test_a_size_that_cannot_be_used_is_refused_from_the_header_alone(size, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("pixels were decoded"))
    with pytest.raises(BadImage, match=reason):
        load_bytes(png_that_claims(*size), tmp_path)


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_a_compressed_chunk_cannot_fill_the_memory(name, tmp_path):
    bomb = png_chunk(name, b"x\0\0" + zlib.compress(bytes(64 << 20)))
    with pytest.raises(BadImage):
        load_bytes(png_that_claims(64, 64, bomb), tmp_path)


def test_tags_that_share_their_data_cannot_fill_the_memory(tmp_path):
    size, tags = 200_000, range(0x8000, 0x8000 + 500)
    entries = b"".join(struct.pack("<HHII", tag, 1, size, 8) for tag in tags)
    exif = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(size)
    tracemalloc.start()
    load_bytes(encoded(half_and_half(), exif=exif), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / "photo.png", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(BadImage, match="limit is 128 MiB"):
        load.load_image(tmp_path / "photo.png")


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_are_read_or_refused_but_nothing_else_escapes(kind, tmp_path):
    rng = np.random.default_rng(0)
    sound = np.frombuffer(encoded(half_and_half(), kind, exif=Image.Exif()), np.uint8)
    for _ in range(150):
        content = sound.copy()
        places = rng.integers(0, min(len(content), 400), rng.integers(1, 8))
        content[places] = rng.integers(0, 256, len(places))
        try:
            assert load_bytes(content.tobytes(), tmp_path).dtype == np.uint8
        except BadImage as error:
            assert error.reason


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"gone\.png"):
        load.load_image(tmp_path / "gone.png")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    half_and_half().save(tmp_path / "photo.png")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)  # root may read everything
        with pytest.raises(BadImage, match="Permission denied"):
            load.load_image(tmp_path / "photo.png")


@pytest.mark.parametrize(
    ("special", "kind"), [("folder", "a folder"), ("pipe", "a named pipe"), ("device", "device")]
)
def test_what_is_no_plain_file_is_refused_unopened(special, kind, tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    if special == "folder":
        path.mkdir()
    elif special == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: pytest.fail("it was opened"))
        with pytest.raises(BadImage, match=kind):
            load.load_image(path)


def test_a_file_that_becomes_a_pipe_when_it_is_opened_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    half_and_half().save(tmp_path / "photo.png")
    sound = os.stat(tmp_path / "photo.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: sound)
        with pytest.raises(BadImage, match="a named pipe"):
            load.load_image(tmp_path / "pipe.png")


def test_libtiff_does_not_write_to_stderr(shared_data, capfd):
    paths = list((shared_data / "bad_images").glob("crash-*.tif"))
    assert paths
    for path in paths:
        with contextlib.suppress(BadImage):
            load.load_image(path)
    assert capfd.readouterr().err == ""


def test_a_name_with_a_nul_is_refused():
    with pytest.raises(BadImage, match="cannot be read"):
        load.load_image("photo\0.png")
