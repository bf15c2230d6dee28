"""Small pictures and image files that the tests of `images` make for themselves."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from hyperrt.photos import load

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


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
    return load.load_image(tmp_path / name)


def shows(picture: np.ndarray, left=RED, right=BLUE, within: int = 3) -> bool:
    """Whether the middle of the left half and of the right have these colours."""
    quarter = picture.shape[1] // 4
    middle = picture[picture.shape[0] // 2].astype(int)
    return bool(np.all(abs(middle[[quarter, -quarter]] - [left, right]) <= within))


def tiff(*pages: dict[int, int], below: dict[int, int] | None = None) -> bytes:
    """Grey pages of 40 x 40 pixels with these tags, too; `below`: all tags of a directory below the first."""
    needed = {256: 40, 257: 40, 258: 8, 262: 1, 273: 8, 278: 40, 279: 1600}
    directories = [needed | tags for tags in pages] + [below or {}]
    places = [8 + 1600]
    for k, tags in enumerate(directories):
        places.append(places[k] + 6 + 12 * (len(tags) + (k == 0)))
    directories[0][330] = places[len(pages)]
    content = struct.pack("<4sI", b"II*\0", places[0]) + bytes([77]) * 1600
    for k, tags in enumerate(directories):
        entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
        following = places[k + 1] if k + 1 < len(pages) else 0
        content += struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", following)
    return content


def jpeg_of_one_grey(width: int, height: int) -> bytes:
    """A JPEG of any size, both sides multiples of 8, that is made without its pixels."""
    content = encoded(Image.new("L", (8, 8), 128), "JPEG")
    frame, scan = content.index(b"\xff\xc0"), content.index(b"\xff\xda") + 10
    header = content[: frame + 5] + struct.pack(">HH", height, width) + content[frame + 9 : scan]
    # A block that is as the one before has six bits, 00 1010; these three bytes are four blocks.
    blocks = width * height // 64
    return header + b"\x28\xa2\x8a" * -(-blocks // 4) + b"\xff\xd9"


def heic(image: Image.Image, **options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.encode(image.mode, image.size, image.tobytes(), buffer, **options)
    return buffer.getvalue()


def srgb_profile(
    name: str = "sRGB", gamma: float | None = None, primaries: np.ndarray | None = None
) -> bytes:
    """An ICC profile of that description; by default sRGB's curve and primaries.

    Args:
        gamma: of a plain power law, in place of the curve.
        primaries: [3, 3], rows X, Y, Z, columns red, green, blue, for white D50.
    """
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if gamma is not None:
        curve = content.index(b"para")
        new = struct.pack(">4sIHHi", b"para", 0, 0, 0, round(gamma * 65536))
        content = content[:curve] + new.ljust(32, b"\0") + content[curve + 32 :]
    if primaries is not None:
        for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True):
            at = int.from_bytes(content[content.index(tag) + 4 :][:4])
            content = (
                content[: at + 8] + struct.pack(">3i", *np.rint(xyz * 65536).astype(int)) + content[at + 20 :]
            )
    return content.replace("sRGB".encode("utf-16-be"), f"{name:4.4}".encode("utf-16-be"))


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of one channel."""
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256)).ljust(16, b"\0")
    white = struct.pack(">4sI3i", b"XYZ ", 0, 63190, 65536, 54061)
    tags = struct.pack(">I4sII4sII", 2, b"kTRC", 156, 14, b"wtpt", 172, 20)
    header = struct.pack(">I4sI4s4s4s", 192, bytes(4), 0x02100000, b"mntr", b"GRAY", b"XYZ ") + bytes(12)
    header += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + tags + curve + white
