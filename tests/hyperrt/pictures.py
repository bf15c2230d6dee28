"""Small pictures and image files that the tests of `images` make for themselves."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from hyperrt import images

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
    return images.load_image(tmp_path / name)


def shows(picture: np.ndarray, left=RED, right=BLUE, within: int = 3) -> bool:
    """Whether the middle of the left half and of the right have these colours."""
    quarter = picture.shape[1] // 4
    middle = picture[picture.shape[0] // 2].astype(int)
    return bool(np.all(abs(middle[[quarter, -quarter]] - [left, right]) <= within))
