"""Photos are read or refused with a reason, whatever the file holds; and become the encoder's pixels."""

from __future__ import annotations

import csv
import io
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from hyperrt import images
from hyperrt.errors import BadImage, BadInput, BundleMismatch, NotFound

ROOT = Path(__file__).resolve().parents[2]
BAD_IMAGES = ROOT / ".." / "shared" / "data" / "bad_images"
SPEC = SimpleNamespace(size=64, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], resample="bicubic", crop="pad")
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def rows() -> list[dict[str, str]]:
    if not BAD_IMAGES.is_dir():
        return []
    with open(BAD_IMAGES / "PROVENANCE.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def half_and_half(size: tuple[int, int] = (80, 60), mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def noise(size: tuple[int, int] = (80, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_that_claims(width: int, height: int, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    content = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + content + png_chunk(b"IEND", b"")


def load_bytes(content: bytes, tmp_path: Path, name: str = "photo.png") -> np.ndarray:
    (tmp_path / name).write_bytes(content)
    return images.load_image(tmp_path / name)


def shows(picture: np.ndarray, left=RED, right=BLUE, within: int = 3) -> bool:
    """Whether the middle of the left half and of the right have these colours."""
    quarter = picture.shape[1] // 4
    middle = picture[picture.shape[0] // 2].astype(int)
    return bool(np.all(abs(middle[[quarter, -quarter]] - [left, right]) <= within))


# The collection of malformed, hostile and unusual files


@pytest.mark.parametrize("row", rows() or [None], ids=lambda row: row["file"] if row else "no shared data")
def test_every_file_of_the_collection_ends_as_its_row_asks(row, shared_data):
    wanted, path = row["suggested_outcome"], shared_data / "bad_images" / row["file"]
    try:
        picture = images.load_image(path)
    except BadImage as error:
        assert not wanted.startswith(("accept as RGB", "accept, upright"))
        assert wanted != "accept_first_frame_only"
        assert error.name == str(path)
        assert error.reason
        assert error.do
        assert len(str(error).splitlines()) == 3
    else:
        assert wanted.startswith(("accept", "either"))
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        assert min(picture.shape[:2]) >= images.MIN_SIDE


def test_the_collection_as_a_folder_gives_its_first_good_photos_and_a_reason_for_each_bad_one(shared_data):
    photos = images.load_folder(shared_data / "bad_images")
    assert len(photos.images) == len(photos.names) == images.MAX_PHOTOS
    assert all(name and reason for name, reason in photos.rejected)
    assert "eps_timeout-d675703545fee17acab56e5fec644c19979175de.eps" in dict(photos.ignored)


@pytest.mark.parametrize("turn", [3, 5, 6, 8])
def test_photos_of_one_scene_are_the_same_whatever_their_orientation_tag(turn, shared_data):
    upright = images.load_image(shared_data / "photos" / "hopper.png").astype(int)
    turned = images.load_image(shared_data / "bad_images" / f"hopper_orientation_{turn}.jpg").astype(int)
    assert abs(turned - upright).mean() < 6
    assert abs(turned[:, ::-1] - upright).mean() > 20


def test_a_turned_tiff_is_turned_once(shared_data):
    path = shared_data / "bad_images" / "g4_orientation_6.tif"
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(images.load_image(path), np.asarray(expected))


# Files that are accepted


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
    exif[images.ORIENTATION] = orientation
    picture = load_bytes(encoded(stored, kind, exif=exif), tmp_path)
    assert picture.shape == (60, 80, 3)
    assert shows(picture, within=10)


def test_a_damaged_exif_block_does_not_cost_the_photo(tmp_path):
    assert shows(load_bytes(encoded(half_and_half(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), tmp_path))


def test_colours_are_converted_from_their_profile_to_srgb(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    image = half_and_half()
    assert shows(load_bytes(encoded(image, icc_profile=srgb.tobytes()), tmp_path), within=0)
    # A profile that does not fit, or is none, leaves the numbers as they are.
    assert shows(load_bytes(encoded(image, icc_profile=lab.tobytes()), tmp_path), within=0)
    assert shows(load_bytes(encoded(image, icc_profile=b"no profile"), tmp_path), within=0)


def test_another_colour_space_is_seen_in_the_picture(tmp_path):
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = swapped.index(b"rXYZ"), swapped.index(b"bXYZ", 128)
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    swapped = bytearray(bytes(swapped).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")))
    picture = load_bytes(encoded(half_and_half(), icc_profile=bytes(swapped)), tmp_path)
    assert shows(picture, left=BLUE, right=RED, within=8)


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
    assert shows(images.load_image(str(tmp_path / "link")))


# Files that are refused


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
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
        (b"\0\0\0\x18ftypheic", "it is HEIC"),
        (b"\0\0\0\x18ftypavif", "it is AVIF"),
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


def test_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / "photo.png", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(BadImage, match="limit is 64 MiB"):
        images.load_image(tmp_path / "photo.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
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
        images.load_image(tmp_path / "gone.png")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    half_and_half().save(tmp_path / "photo.png")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)  # root may read everything
        with pytest.raises(BadImage, match="Permission denied"):
            images.load_image(tmp_path / "photo.png")


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
            images.load_image(path)


def test_a_file_that_becomes_a_pipe_when_it_is_opened_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    half_and_half().save(tmp_path / "photo.png")
    sound = os.stat(tmp_path / "photo.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: sound)
        with pytest.raises(BadImage, match="a named pipe"):
            images.load_image(tmp_path / "pipe.png")


def test_a_name_with_a_nul_is_refused():
    with pytest.raises(BadImage, match="cannot be read"):
        images.load_image("photo\0.png")


# Pictures in memory


def test_arrays_and_pil_images_are_taken_and_left_as_they_are():
    image = half_and_half(mode="RGBA")
    array = np.array(image)
    for source in (image, array, array[..., :3], array[:, ::-1][:, ::-1]):
        assert shows(images.load_image(source))
    assert image.mode == "RGBA"
    picture = images.load_image(array[..., :3])
    picture[:] = 0
    assert array[..., 0].any()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32; wanted"),
        (np.zeros((3, 64, 64), np.uint8), r"\[3, 64, 64\] of uint8"),
        (np.zeros(64, np.uint8), r"\[64\]"),
        (np.zeros((4, 64, 64, 3), np.uint8), r"\[4, 64, 64, 3\]"),
        (np.zeros((0, 0, 3), np.uint8), "0 x 0"),
        (None, "a NoneType; wanted"),
    ],
    ids=["float", "channels first", "one axis", "batch", "empty", "None"],
)
def test_other_things_in_memory_are_refused(source, reason):
    with pytest.raises(BadImage, match=reason):
        images.load_image(source)


# Folders


def test_a_folder_gives_its_photos_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"IMG_{number}.png")
    photos = images.load_folder(tmp_path)
    assert photos.names == ["IMG_1.png", "IMG_2.png", "IMG_10.png"]
    assert [image[0, 0, 0] for image in photos.images] == [1, 2, 10]
    assert photos.rejected == photos.ignored == []


def test_one_bad_photo_among_good_ones_is_left_out_with_its_reason(subject_folder):
    (subject_folder / "2b.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    photos = images.load_folder(subject_folder)
    assert photos.names == ["1.png", "2.png", "3.png", "4.png"]
    [(name, reason)] = photos.rejected
    assert name == "2b.jpg"
    assert "damaged" in reason


def test_strict_refuses_the_first_bad_photo_by_name(subject_folder):
    (subject_folder / "2b.jpg").write_bytes(b"")
    with pytest.raises(BadImage, match=r"'2b\.jpg'\n.*empty"):
        images.load_folder(subject_folder, strict=True)


def test_strict_is_content_with_good_photos_beside_other_things(subject_folder):
    (subject_folder / "notes.txt").write_text("of a robot")
    (subject_folder / "raw").mkdir()
    (subject_folder / ".DS_Store").write_bytes(b"\0")
    photos = images.load_folder(subject_folder, strict=True)
    assert len(photos.images) == 4
    assert photos.ignored == [("notes.txt", "no picture"), ("raw", "a folder")]
    assert photos.rejected == []


def test_a_photo_without_a_known_suffix_is_found_by_its_contents(subject_folder):
    (subject_folder / "1.png").rename(subject_folder / "download")
    assert images.load_folder(subject_folder).names == ["2.png", "3.png", "4.png", "download"]


def test_pipes_sockets_links_and_folders_do_not_stop_the_good_photos(subject_folder, monkeypatch):
    monkeypatch.chdir(subject_folder)  # a socket's name must be short
    os.mkfifo("pipe.png")
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
    os.symlink(".", "loop")
    os.symlink("self.png", "self.png")
    os.symlink("/dev/zero", "zero.png")
    os.symlink("1.png", "link.png")
    os.mkdir("folder.png")
    photos = images.load_folder(subject_folder)
    assert photos.names == ["1.png", "2.png", "3.png", "4.png"]
    reasons = dict(photos.rejected)
    assert sorted(reasons) == ["link.png", "pipe.png", "self.png", "socket.jpg", "zero.png"]
    assert "a named pipe" in reasons["pipe.png"]
    assert all("a symbolic link" in reasons[name] for name in ("link.png", "self.png", "zero.png"))
    assert sorted(dict(photos.ignored)) == ["folder.png", "loop", "pipe"]


def test_the_folder_itself_may_be_a_link(subject_folder, tmp_path):
    (tmp_path / "link").symlink_to(subject_folder)
    assert len(images.load_folder(tmp_path / "link").images) == 4


def test_the_same_picture_twice_is_used_once_and_said(subject_folder):
    (subject_folder / "5.png").write_bytes((subject_folder / "2.png").read_bytes())
    photos = images.load_folder(subject_folder, strict=True)
    assert len(photos.images) == 4
    assert photos.rejected == [("5.png", "it is the same picture as 2.png")]


def test_of_ten_thousand_photos_the_first_are_used_and_the_rest_is_said(tmp_path):
    for number in range(images.MAX_PHOTOS + 2):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    for number in range(images.MAX_PHOTOS + 2, 10_000):
        (tmp_path / f"{number}.png").touch()
    photos = images.load_folder(tmp_path)
    assert photos.names == [f"{number}.png" for number in range(images.MAX_PHOTOS)]
    assert photos.rejected == [("16.png and 9,983 more", "only the first 16 photos of a folder are used")]


def test_a_folder_of_more_files_than_any_folder_of_photos_is_refused(subject_folder, monkeypatch):
    monkeypatch.setattr(images, "MAX_ENTRIES", 3)
    with pytest.raises(BadInput, match="more than 3 files"):
        images.load_folder(subject_folder)


@pytest.mark.parametrize("content", ["nothing", "text", "folder"])
def test_a_folder_without_photos_says_what_it_holds(content, tmp_path):
    if content == "text":
        (tmp_path / "notes").write_text("notes")
    elif content == "folder":
        (tmp_path / "robot").mkdir()
    count = 0 if content == "nothing" else 1
    with pytest.raises(BadInput, match=rf"holds no photos\n.*{count} files or folders.*\n.*JPEG, PNG"):
        images.load_folder(tmp_path)


def test_when_no_photo_is_left_the_first_reasons_are_given(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"none of the 5 photos .*\n.*0\.png: it is empty.*and 2 more\n"):
        images.load_folder(tmp_path)


def test_a_missing_folder_and_a_file_in_its_place_are_refused(subject_folder):
    with pytest.raises(NotFound, match="gone"):
        images.load_folder(subject_folder / "gone")
    with pytest.raises(BadInput, match="Not a directory"):
        images.load_folder(subject_folder / "1.png")


def test_a_hostile_file_name_is_printed_harmlessly(subject_folder):
    name = b"\x1b[2J\n\xff\xe2\x80\xaenet.png"
    with open(os.path.join(os.fsencode(subject_folder), name), "wb"):
        pass
    [(shown, _)] = images.load_folder(subject_folder).rejected
    assert shown == r"\x1b[2J\n\udcff\u202enet.png"
    assert shown.encode("ascii")


# Pixels for the image encoder


def test_pixels_are_float32_channels_first_and_normalised():
    pixels = images.preprocess([np.full((64, 64, 3), (0, 127.5, 255), np.uint8)], SPEC)
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, 3, 64, 64)
    assert np.allclose(pixels[0, :, 5, 5], [-1, 127 / 127.5 - 1, 1], atol=1e-6)


def test_a_square_picture_of_the_right_size_is_only_normalised():
    picture = np.asarray(noise((64, 64)))
    expected = (picture / 255 - 0.5) / 0.5
    assert np.allclose(images.preprocess([picture], SPEC)[0].transpose(1, 2, 0), expected, atol=1e-6)


def test_each_channel_has_its_own_mean_and_std():
    spec = SimpleNamespace(**{**vars(SPEC), "mean": [0, 0.25, 0.5], "std": [1, 0.5, 0.25]})
    pixels = images.preprocess([np.full((64, 64, 3), 255, np.uint8)], spec)
    assert np.allclose(pixels[0, :, 0, 0], [1, 1.5, 2])


@pytest.mark.parametrize("size", [(80, 40), (40, 80), (512, 128), (1024, 52)])
def test_pad_adds_white_around_the_whole_photo(size):
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    pixels = images.preprocess([picture], SPEC)[0, 0]
    black = float((1 - pixels).sum() / 2) / 64**2
    assert black == pytest.approx(min(size) / max(size), abs=0.01)
    assert abs(pixels - pixels[::-1, ::-1]).max() < 0.2  # centred, to a pixel of the photo


@pytest.mark.parametrize("size", [(120, 40), (40, 120), (121, 40), (40, 40)])
def test_center_cuts_the_ends_of_the_longer_side(size):
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    top, left = (size[1] - 40) // 2, (size[0] - 40) // 2
    picture[top : top + 40, left : left + 40] = 255
    pixels = images.preprocess([picture], SimpleNamespace(**{**vars(SPEC), "crop": "center"}))
    assert pixels[..., 2:-2, 2:-2].min() > 0.99


def test_reduction_is_antialiased():
    checks = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = images.preprocess([np.stack([checks] * 3, -1)], SPEC)
    assert abs(pixels).max() < 0.05


def test_pixels_are_those_of_pillow_bicubic():
    picture = noise((100, 100))
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    pixels = images.preprocess([np.asarray(picture)], SPEC)[0].transpose(1, 2, 0)
    assert np.allclose(pixels, expected, atol=1e-6)


def test_photos_of_different_sizes_make_one_batch_in_order():
    pictures = [np.full((50, 50 + 10 * number, 3), number, np.uint8) for number in range(3)]
    pixels = images.preprocess(pictures, SPEC)
    assert np.allclose(pixels[:, 0, 32, 32], np.arange(3) / 127.5 - 1, atol=1e-6)


def test_no_photos_make_an_empty_batch():
    assert images.preprocess([], SPEC).shape == (0, 3, 64, 64)


@pytest.mark.parametrize(("key", "value"), [("resample", "lanczos"), ("crop", "stretch")])
def test_an_unknown_way_of_preparing_photos_is_refused(key, value):
    with pytest.raises(BundleMismatch, match=value):
        images.preprocess([], SimpleNamespace(**{**vars(SPEC), key: value}))


def test_reading_a_photo_imports_only_the_readers_it_may_need(tmp_path):
    (tmp_path / "text.png").write_text("no photo: every allowed reader is asked")
    half_and_half().save(tmp_path / "photo.png")
    code = (
        "import sys; from hyperrt import images; photos = images.load_folder(sys.argv[1]); "
        "print(len(photos.images), len(photos.rejected), 'PIL.PsdImagePlugin' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == ["1", "1", "False"]
