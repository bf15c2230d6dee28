"""A file is what its contents are: raw and thumbnails are no photos, large JPEGs and HEIC are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image

from hyperrt.errors import BadImage
from hyperrt.photos import formats, load
from tests.hyperrt.pictures import (
    encoded,
    half_and_half,
    heic,
    jpeg_of_one_grey,
    load_bytes,
    noise,
    shows,
    srgb_profile,
    tiff,
)

ROOT = Path(__file__).resolve().parents[3]
THUMBNAIL, CFA, LINEAR_RAW = {254: 1}, {262: 32803}, {262: 34892}


def refused(content: bytes, reason: str) -> str:
    """What to do, by the error for these contents."""
    with pytest.raises(BadImage, match=reason) as caught:
        load.load_image(content)
    assert len(str(caught.value).splitlines()) == 3
    return caught.value.do


# Camera raw, and thumbnails in place of photos


@pytest.mark.parametrize(
    "content",
    [
        tiff({50706: 0x0401}),
        tiff(THUMBNAIL | {50706: 0x0401}, below=CFA),
        tiff(THUMBNAIL, below=CFA),
        tiff({}, below=LINEAR_RAW),
        tiff(CFA),
        tiff(THUMBNAIL, CFA),
        tiff({}).replace(b"II*\0\x48\x06\0\0", b"II*\0\x48\x06\0\0CR\2\0"),
        b"FUJIFILMCCD-RAW 0201FF383501",
        b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
        b"IIRO\x08\0\0\0",
        b"IIRS\x08\0\0\0",
        b"IIU\0\x18\0\0\0",
        b"II\x1a\0\0\0HEAPCCDR",
    ],
    ids=["dng", "dng-cfa", "nef", "linear", "pef", "srw", "cr2", "raf", "cr3", "orf", "orf-s", "rw2", "crw"],
)
def test_camera_raw_is_refused_by_name_whatever_the_suffix(content, tmp_path):
    with pytest.raises(BadImage, match="camera raw") as caught:
        load_bytes(content, tmp_path, "photo.tif")
    assert "export it as JPEG" in caught.value.do


def test_a_tiff_with_a_raw_files_name_is_refused(tmp_path):
    with pytest.raises(BadImage, match="camera raw"):
        load_bytes(tiff({}), tmp_path, "photo.KDC")


def test_a_plain_tiff_is_read_with_smaller_copies_below_and_after_it():
    assert np.all(load.load_image(tiff({}, THUMBNAIL, below=THUMBNAIL)) == 77)


@pytest.mark.parametrize("mark", [{254: 1}, {255: 2}])
def test_a_thumbnail_before_the_photo_is_passed_over(mark):
    first = mark | {256: 32, 257: 32}
    assert load.load_image(tiff(first, {})).shape == (40, 40, 3)


def test_a_thumbnail_without_its_photo_is_refused():
    refused(tiff(THUMBNAIL), "thumbnail of 40 x 40 pixels")


def test_a_chain_of_thumbnails_has_an_end():
    refused(tiff(*[THUMBNAIL] * 50), "thumbnail")


def test_a_broken_directory_below_does_not_cost_the_photo():
    assert load.load_image(tiff({}, below={330: 2**32 - 1})).shape == (40, 40, 3)


def test_raw_files_in_a_folder_are_left_out_with_the_reason(subject_folder):
    (subject_folder / "5.NEF").write_bytes(tiff(THUMBNAIL, below=CFA))
    (subject_folder / "6.cr3").write_bytes(b"\0\0\0\x18ftypcrx ")
    photos = load.load_folder(subject_folder)
    assert len(photos.images) == 4
    assert [name for name, reason in photos.rejected if "camera raw" in reason] == ["5.NEF", "6.cr3"]


# Large JPEGs


PEAK = """
import sys
from hyperrt.photos import load as images
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
images.load_image(sys.argv[2])
before = peak()
picture = images.load_image(sys.argv[1])
print(*picture.shape, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_jpeg_of_200_megapixels_is_read_in_the_memory_of_a_small_photo(tmp_path):
    (tmp_path / "large.jpg").write_bytes(jpeg_of_one_grey(16_320, 12_240))
    (tmp_path / "small.jpg").write_bytes(jpeg_of_one_grey(80, 80))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large.jpg"), str(tmp_path / "small.jpg")]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    height, width, channels, kib = map(int, result.stdout.split())
    assert (height, width, channels) == (768, 1024, 3)
    assert kib < 100 << 10  # all its pixels are 195 MiB


def test_a_jpeg_larger_than_any_phone_writes_is_refused(tmp_path):
    refused(jpeg_of_one_grey(16_384, 12_296), "at most 16,384 a side and 201 million")
    refused(jpeg_of_one_grey(16_392, 1_024), "at most 16,384 a side")


def test_a_large_jpeg_whose_pixels_are_all_wanted_has_the_limit_of_other_files(monkeypatch):
    content = encoded(half_and_half((4000, 3000)), "JPEG")
    monkeypatch.setattr(formats, "MAX_PIXELS", 10_000_000)
    assert load.load_image(content).shape == (768, 1024, 3)
    with pytest.raises(BadImage, match="10 million"):
        load.load_image(content, keep_side=4000)


def test_a_jpeg_of_many_scans_is_refused_before_they_take_hours():
    content = encoded(noise((64, 64)), "JPEG", progressive=True)
    assert load.load_image(content).shape == (64, 64, 3)
    last = content.rindex(b"\xff\xda")
    refused(content[:last] + content[last:-2] * 5000 + content[-2:], "more than 100 scans")


# AVIF and HEIC


@pytest.mark.skipif(not AvifImagePlugin.SUPPORTED, reason="this Pillow has no AVIF")
def test_avif_is_read_upright(shared_data):
    assert shows(load.load_image(encoded(half_and_half(), "AVIF", quality=90)), within=12)
    assert load.load_image(shared_data / "bad_images" / "avif_rot1mir0.avif").shape == (427, 640, 3)


def test_avif_that_this_pillow_cannot_read_says_what_to_install(monkeypatch):
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    assert refused(b"\0\0\0\x18ftypavif", "it is AVIF") == "pip install --upgrade pillow"


def test_heic_is_read_and_the_pillow_of_the_process_left_as_it_is():
    assert shows(load.load_image(heic(half_and_half())), within=12)
    assert not {"HEIF", "HEIC"} & set(Image.OPEN)


def test_heic_is_turned_upright_and_its_profile_converted():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = half_and_half().transpose(Image.Transpose.ROTATE_90)
    assert shows(load.load_image(heic(stored, exif=exif.tobytes())), within=12)
    grey = heic(Image.new("RGB", (64, 64), (55, 55, 55)), icc_profile=srgb_profile(gamma=1))
    assert abs(load.load_image(grey).astype(int) - 128).max() <= 3


def test_heic_is_read_itself_and_not_its_thumbnail():
    content = heic(noise((640, 480)), thumbnails=[320])
    assert b"thmb" in content
    assert load.load_image(content, keep_side=256).shape == (192, 256, 3)
    assert load.load_image(content).shape == (480, 640, 3)


@pytest.mark.parametrize("missing", ["absent", "old"])
def test_without_pillow_heif_the_error_says_what_to_install(missing, monkeypatch):
    if missing == "absent":
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
    else:
        monkeypatch.setattr(pytest.importorskip("pillow_heif"), "__version__", "1.3.0")
    do = refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC, which needs pillow-heif")
    assert do == "pip install 'pillow-heif>=1.4'"


@pytest.mark.parametrize("size", [(31, 64), (40, 900)])
def test_the_limits_of_size_hold_for_heic(size):
    refused(heic(half_and_half(size)), "pixels; ")


def test_a_heic_of_more_pixels_than_it_declares_is_refused():
    content = heic(half_and_half((800, 600)))
    at = content.index(b"ispe") + 8
    refused(content[:at] + (64).to_bytes(4) * 2 + content[at + 8 :], "damaged")


def test_flipped_bytes_of_a_heic_are_read_or_refused_but_nothing_else_escapes():
    rng = np.random.default_rng(0)
    sound = np.frombuffer(heic(half_and_half()), np.uint8)
    for _ in range(300):
        content = sound.copy()
        places = rng.integers(0, len(content), rng.integers(1, 8))
        content[places] = rng.integers(0, 256, len(places))
        try:
            assert load.load_image(content.tobytes()).dtype == np.uint8
        except BadImage as error:
            assert error.reason
