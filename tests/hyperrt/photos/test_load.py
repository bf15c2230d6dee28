"""Photos become upright sRGB pictures, and pictures the pixels that the image encoder was trained on."""

from __future__ import annotations

import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from hyperrt.errors import BadImage, BundleMismatch
from hyperrt.photos import formats, load, srgb
from tests.hyperrt.pictures import (
    BLUE,
    RED,
    WHITE,
    encoded,
    half_and_half,
    load_bytes,
    noise,
    png_chunk,
    shows,
)

SPEC = SimpleNamespace(size=64, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], resample="bicubic", crop="pad")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo"])
def test_the_contents_decide_and_not_the_name(kind, name, tmp_path):
    assert shows(load_bytes(encoded(half_and_half(), kind), tmp_path, name), within=10)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode, tmp_path):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert shows(load_bytes(encoded(half_and_half(mode=mode), kind), tmp_path))


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    assert shows(load_bytes(encoded(half_and_half(mode="CMYK"), "JPEG"), tmp_path), within=12)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_photos_become_rgb(mode, tmp_path):
    picture = load_bytes(encoded(Image.new("L", (40, 40), 255).convert(mode)), tmp_path)
    assert np.all(picture == 255)
    assert picture.shape == (40, 40, 3)


def test_sixteen_bits_become_the_upper_eight(tmp_path):
    ramp = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    picture = load_bytes(encoded(Image.fromarray(ramp)), tmp_path)
    assert np.array_equal(picture[..., 0], ramp >> 8)


def test_sixteen_bit_colour_is_read(tmp_path):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))
    line = b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0) * 40
    content = png_chunk(b"IDAT", zlib.compress(line * 40))
    picture = load_bytes(b"\x89PNG\r\n\x1a\n" + header + content + png_chunk(b"IEND", b""), tmp_path)
    assert np.all(picture == (255, 128, 0))


def test_transparency_is_composited_on_white(tmp_path):
    image = half_and_half(mode="RGBA")
    image.paste((0, 0, 255, 0), (40, 0, 80, 60))
    assert shows(load_bytes(encoded(image), tmp_path), right=WHITE)
    image.paste((0, 0, 255, 128), (40, 0, 80, 60))
    assert shows(load_bytes(encoded(image), tmp_path), right=(127, 127, 255))


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "I;16"])
def test_a_transparent_colour_becomes_white(mode, tmp_path):
    if mode == "P":
        image = half_and_half().quantize(2)
        clear, kept = image.getpixel((70, 30)), RED
    elif mode == "RGB":
        image, clear, kept = half_and_half(), BLUE, RED
    elif mode == "L":
        image, clear, kept = Image.new("L", (80, 60), 80), 10, (80, 80, 80)
        image.paste(10, (40, 0, 80, 60))
    else:
        samples = np.full((60, 80), 80 << 8, np.uint16)
        samples[:, 40:] = 10
        image, clear, kept = Image.fromarray(samples), 10, (80, 80, 80)
    assert shows(load_bytes(encoded(image, transparency=clear), tmp_path), left=kept, right=WHITE)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_used(kind, tmp_path):
    more = {"save_all": True, "append_images": [Image.new("RGB", (80, 60), WHITE)] * 3}
    assert shows(load_bytes(encoded(half_and_half(), kind, **more), tmp_path), within=10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(kind, orientation, tmp_path):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = half_and_half()
    stored = image.transpose(undo[orientation]) if orientation in undo else image
    exif = Image.Exif()
    exif[srgb.ORIENTATION] = orientation
    picture = load_bytes(encoded(stored, kind, exif=exif), tmp_path)
    assert picture.shape == (60, 80, 3)
    assert shows(picture, within=10)


def test_a_damaged_exif_block_does_not_cost_the_photo(tmp_path):
    assert shows(load_bytes(encoded(half_and_half(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), tmp_path))


def test_a_very_large_photo_is_reduced(tmp_path):
    picture = load_bytes(encoded(half_and_half((4000, 3000)), "JPEG"), tmp_path)
    assert picture.shape == (768, 1024, 3)
    assert shows(picture, within=10)


def test_a_photo_of_moderate_size_keeps_its_pixels(tmp_path):
    image = noise((1024, 100))
    assert np.array_equal(load_bytes(encoded(image), tmp_path), np.asarray(image))


def test_a_file_that_is_named_may_be_reached_by_a_link(tmp_path):
    half_and_half().save(tmp_path / "photo.png")
    (tmp_path / "link").symlink_to("photo.png")
    assert shows(load.load_image(str(tmp_path / "link")))


@pytest.mark.parametrize("turn", [3, 5, 6, 8])
def test_photos_of_one_scene_are_the_same_whatever_their_orientation_tag(turn, shared_data):
    upright = load.load_image(shared_data / "photos" / "hopper.png").astype(int)
    turned = load.load_image(shared_data / "bad_images" / f"hopper_orientation_{turn}.jpg").astype(int)
    assert abs(turned - upright).mean() < 6
    assert abs(turned[:, ::-1] - upright).mean() > 20


def test_a_turned_tiff_is_turned_once(shared_data):
    path = shared_data / "bad_images" / "g4_orientation_6.tif"
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(load.load_image(path), np.asarray(expected))


# Pictures in memory


def test_arrays_and_pil_images_are_taken_and_left_as_they_are():
    image = half_and_half(mode="RGBA")
    array = np.array(image)
    for source in (image, array, array[..., :3], array[:, ::-1][:, ::-1]):
        assert shows(load.load_image(source))
    assert image.mode == "RGBA"
    picture = load.load_image(array[..., :3])
    picture[:] = 0
    assert array[..., 0].any()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32; it must be"),
        (np.zeros((3, 64, 64), np.uint8), r"\[3, 64, 64\] of uint8"),
        (np.zeros(64, np.uint8), r"\[64\]"),
        (np.zeros((4, 64, 64, 3), np.uint8), r"\[4, 64, 64, 3\]"),
        (np.zeros((0, 0, 3), np.uint8), "0 x 0"),
        (None, "of type NoneType"),
    ],
    ids=["float", "channels first", "one axis", "batch", "empty", "None"],
)
def test_other_things_in_memory_are_refused(source, reason):
    with pytest.raises(BadImage, match=reason):
        load.load_image(source)


# Pixels for the image encoder


def test_pixels_are_float32_channels_first_and_normalised():
    pixels = load.preprocess([np.full((64, 64, 3), (0, 127.5, 255), np.uint8)], SPEC)
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, 3, 64, 64)
    assert np.allclose(pixels[0, :, 5, 5], [-1, 127 / 127.5 - 1, 1], atol=1e-6)


def test_a_square_picture_of_the_right_size_is_only_normalised():
    picture = np.asarray(noise((64, 64)))
    expected = (picture / 255 - 0.5) / 0.5
    assert np.allclose(load.preprocess([picture], SPEC)[0].transpose(1, 2, 0), expected, atol=1e-6)


def test_each_channel_has_its_own_mean_and_std():
    spec = SimpleNamespace(**{**vars(SPEC), "mean": [0, 0.25, 0.5], "std": [1, 0.5, 0.25]})
    pixels = load.preprocess([np.full((64, 64, 3), 255, np.uint8)], spec)
    assert np.allclose(pixels[0, :, 0, 0], [1, 1.5, 2])


@pytest.mark.parametrize("size", [(80, 40), (40, 80), (512, 128), (1024, 52)])
def test_pad_adds_white_around_the_whole_photo(size):
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    pixels = load.preprocess([picture], SPEC)[0, 0]
    black = float((1 - pixels).sum() / 2) / 64**2
    assert black == pytest.approx(min(size) / max(size), abs=0.01)
    assert abs(pixels - pixels[::-1, ::-1]).max() < 0.2  # centred, to a pixel of the photo


@pytest.mark.parametrize("size", [(120, 40), (40, 120), (121, 40), (40, 40)])
def test_center_cuts_the_ends_of_the_longer_side(size):
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    top, left = (size[1] - 40) // 2, (size[0] - 40) // 2
    picture[top : top + 40, left : left + 40] = 255
    pixels = load.preprocess([picture], SimpleNamespace(**{**vars(SPEC), "crop": "center"}))
    assert pixels[..., 2:-2, 2:-2].min() > 0.99


def test_reduction_is_antialiased():
    checks = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = load.preprocess([np.stack([checks] * 3, -1)], SPEC)
    assert abs(pixels).max() < 0.05


def test_pixels_are_those_of_pillow_bicubic():
    picture = noise((100, 100))
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    pixels = load.preprocess([np.asarray(picture)], SPEC)[0].transpose(1, 2, 0)
    assert np.allclose(pixels, expected, atol=1e-6)


def test_photos_of_different_sizes_make_one_batch_in_order():
    pictures = [np.full((50, 50 + 10 * number, 3), number, np.uint8) for number in range(3)]
    pixels = load.preprocess(pictures, SPEC)
    assert np.allclose(pixels[:, 0, 32, 32], np.arange(3) / 127.5 - 1, atol=1e-6)


def test_no_photos_make_an_empty_batch():
    assert load.preprocess([], SPEC).shape == (0, 3, 64, 64)


@pytest.mark.parametrize(("key", "value"), [("resample", "lanczos"), ("crop", "stretch")])
def test_an_unknown_way_of_preparing_photos_is_refused(key, value):
    with pytest.raises(BundleMismatch, match=value):
        load.preprocess([], SimpleNamespace(**{**vars(SPEC), key: value}))


def test_the_contents_of_a_file_are_read_as_the_file_is(tmp_path):
    content = encoded(half_and_half(), "JPEG")
    assert np.array_equal(load.load_image(content), load_bytes(content, tmp_path))
    for broken in (b"", content[:200], b"no picture"):
        with pytest.raises(BadImage):
            load.load_image(broken)


def test_a_photo_keeps_as_many_pixels_as_are_asked_for():
    content = encoded(noise((1500, 300)), "PNG")
    assert load.load_image(content).shape == (205, 1024, 3)
    assert load.load_image(content, keep_side=formats.MAX_SIDE).shape == (300, 1500, 3)


def test_a_link_is_followed_only_where_that_is_wanted(tmp_path):
    (tmp_path / "photo.png").write_bytes(encoded(half_and_half()))
    (tmp_path / "link.png").symlink_to("photo.png")
    assert shows(load.load_image(tmp_path / "link.png"))
    with pytest.raises(BadImage, match="a symbolic link"):
        load.load_image(tmp_path / "link.png", follow=False)
